"""What a gateway costs between a client and the replica that runs its turn.

    python -m loadtest.bench.relay [--rounds 200] [--parts turns relay unary]

Real processes on loopback: a store, a gateway, and a worker with the sim engine or, for what a
gateway relays at most, a replica that plays canned messages (``loadtest.bench.player``). The client
is this process, and speaks raw bytes.

``turns``: the same turns of one session dispatched by this process to the worker directly, as a
gateway does; through a relay that does nothing else (``loadtest.bench.bare_relay``); and through
the gateway; in turn, so that what else the machine does meets all alike. Time to the first token,
and the CPU time of each process (of a short turn; and, from a longer one, of an event more).
``relay``: streams of 16-token messages through one gateway, at once; the CPU share tells whether
the gateway was what was full.
``unary``: GetSession by some callers at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import anyio
import psutil
from grpc import StatusCode, aio
from sessile.v1 import replica_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.frames import Kind, events
from gateway.cli.launch import Child, Cluster
from loadtest.bench.player import MODEL, TOKENS_PER_MESSAGE
from statestore.embedded import dies_with_parent

SESSIONS = "/sessile.v1.SessionService/"
REPLICA = "/sessile.v1.ReplicaService/"
SHORT, LONG = 8, 136
"""Tokens of the two kinds of turns; the engine gives one a step."""
ENGINE = {"step_ms": "2", "decode_token_ms": "0", "prefill_token_ms": "0", "eos_probability": "0"}
WAYS = ("direct", "bare relay", "gateway")
WARM_UP = 10
MESSAGES = 2000
"""Of one stream of ``relay``."""
CALLS = 1000
"""Of one round of ``unary``."""
NUMBERS = count()


@dataclass(slots=True)
class Heard:
    """One stream, as it arrived."""

    ttft_s: float = 0.0
    messages: int = 0
    token_events: int = 0


async def listen(call: Any) -> Heard:
    """Reads a stream of TurnStream messages to its end; ``call`` has been made just now."""
    heard, began = Heard(), time.perf_counter()
    async for message in call:
        heard.messages += 1
        for kind, _, _ in events(message):
            if kind is Kind.TOKENS:
                heard.token_events += 1
                heard.ttft_s = heard.ttft_s or time.perf_counter() - began
    return heard


def turn_request(session_id: str, tokens: int) -> pb.RunTurnRequest:
    """A new turn."""
    return pb.RunTurnRequest(
        session_id=session_id,
        turn_id=f"t{next(NUMBERS)}",
        messages=[pb.Message(role=pb.Message.ROLE_USER, content="Go on.")],
        params=pb.SamplingParams(max_tokens=tokens, ignore_eos=True),
    )


class Gateway:
    """Calls to the gateway, as bytes."""

    def __init__(self, channel: aio.Channel) -> None:
        self.run: Any = channel.unary_stream(SESSIONS + "RunTurn")
        self.get: Any = channel.unary_unary(SESSIONS + "GetSession")
        self._open: Any = channel.unary_unary(SESSIONS + "OpenSession")

    async def session(self, model: str) -> str:
        """Id of a new session."""
        message = pb.Message(role=pb.Message.ROLE_SYSTEM, content="Be brief.")
        request = session_pb2.OpenSessionRequest(
            request_id=f"r{next(NUMBERS)}", model=model, messages=[message]
        )
        answer = await self._open(request.SerializeToString())
        return session_pb2.OpenSessionResponse.FromString(answer).session.session_id

    async def get_session(self, session_id: str) -> session_pb2.Session:
        request = session_pb2.GetSessionRequest(session_id=session_id)
        answer = await self.get(request.SerializeToString())
        return session_pb2.GetSessionResponse.FromString(answer).session


@asynccontextmanager
async def started(module: str, argument: str) -> AsyncIterator[tuple[int, str]]:
    """A program that serves: its process id and address."""
    command = dies_with_parent([sys.executable, "-m", module, argument])
    async with await anyio.open_process(command, stderr=None) as process:
        try:
            assert process.stdout is not None
            said = await process.stdout.receive()  # raises EndOfStream if it does not start
            yield process.pid, said.decode().strip()
        finally:
            process.terminate()


# -- turns --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Taken:
    """Of the turns of one way and length: seconds."""

    ttft_s: list[float] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    """Process -> CPU of each turn."""


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


BATCH = 20
"""Turns between two looks at CPU times, which are told in hundredths of a second."""


async def turns(cluster: Cluster, rounds: int) -> dict[str, Any]:
    """Medians by way; CPU by process: of a turn of SHORT tokens, and of an event more."""
    gateway, worker = cluster.gateways[0], cluster.workers[0]
    taken = {(way, tokens): Taken() for way in WAYS for tokens in (SHORT, LONG)}
    async with (
        started("loadtest.bench.bare_relay", worker.address) as (bare, bare_address),
        aio.insecure_channel(gateway.address) as to_gateway,
        aio.insecure_channel(worker.address) as to_worker,
        aio.insecure_channel(bare_address) as to_bare,
    ):
        calls = Gateway(to_gateway)
        dispatch: dict[str, Any] = {
            "direct": to_worker.unary_stream(REPLICA + "DispatchTurn"),
            "bare relay": to_bare.unary_stream(REPLICA + "DispatchTurn"),
        }
        processes = {
            "gateway": psutil.Process(gateway.pid),
            "bare relay": psutil.Process(bare),
            "worker": psutil.Process(worker.pid),
            "client": psutil.Process(),
        }

        async def fresh() -> session_pb2.Session:
            session_id = await calls.session("sim")
            await listen(calls.run(turn_request(session_id, SHORT).SerializeToString()))
            return await calls.get_session(session_id)

        def made(way: str, session: session_pb2.Session, tokens: int) -> Any:
            turn = turn_request(session.session_id, tokens)
            if way == "gateway":
                return calls.run(turn.SerializeToString())
            request = replica_pb2.DispatchTurnRequest(
                turn=turn,
                epoch=session.owner.epoch,
                replica=session.owner.replica,
                tenant="default",
                attempt_id=turn.turn_id,
            )
            return dispatch[way](request.SerializeToString())

        session = await fresh()
        for number in range(WARM_UP + rounds):
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                heard = await listen(made(way, session, SHORT))
                assert heard.token_events > 0, "the turn was not run"
                if number >= WARM_UP:
                    taken[way, SHORT].ttft_s.append(heard.ttft_s)
        heard_events: list[int] = []
        for number in range(max(rounds // BATCH, 2)):
            for tokens in (SHORT, LONG):
                for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                    session = await fresh()  # its context does not grow from way to way
                    before = {name: _cpu_s(process) for name, process in processes.items()}
                    for _ in range(BATCH):
                        heard = await listen(made(way, session, tokens))
                        if tokens == LONG:
                            heard_events.append(heard.token_events)
                    for name, process in processes.items():
                        spent = (_cpu_s(process) - before[name]) / BATCH
                        taken[way, tokens].cpu_s.setdefault(name, []).append(spent)
    more = statistics.median(heard_events) - SHORT
    direct = taken["direct", SHORT].ttft_s
    report: dict[str, Any] = {"events_of_a_long_turn": statistics.median(heard_events)}
    for way in WAYS:
        ttft = taken[way, SHORT].ttft_s
        added = [b - a for a, b in zip(direct, ttft, strict=True)]
        means = {
            tokens: {name: statistics.mean(cpu) for name, cpu in taken[way, tokens].cpu_s.items()}
            for tokens in (SHORT, LONG)
        }
        report[way] = {
            "ttft_p50_ms": _ms(statistics.median(ttft)),
            "added_p50_ms": _ms(statistics.median(added)),
            "added_p90_ms": _ms(statistics.quantiles(added, n=10)[8]),
            "short_turn_cpu_us": {name: _us(cpu) for name, cpu in means[SHORT].items()},
            "event_cpu_us": {
                name: _us((cpu - means[SHORT][name]) / more) for name, cpu in means[LONG].items()
            },
        }
    return report


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


# -- relay --------------------------------------------------------------------------------------


async def relay(gateway: Child, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second through one gateway, by streams at once: medians over rounds."""
    found = []
    process = psutil.Process(gateway.pid)
    async with aio.insecure_channel(gateway.address) as channel:
        calls = Gateway(channel)
        for width in (1, 4, 16):
            rates, shares, sizes = [], [], []
            sessions = [await _when_seen(calls) for _ in range(width)]
            each = MESSAGES // width
            for number in range(rounds + 1):
                cpu_s, began = _cpu_s(process), time.perf_counter()
                heard = await _streams(calls, sessions, each * TOKENS_PER_MESSAGE)
                took, cpu_s = time.perf_counter() - began, _cpu_s(process) - cpu_s
                assert sum(one.token_events for one in heard) == each * width
                if number:  # the first one warms up
                    rates.append(each * width * TOKENS_PER_MESSAGE / took)
                    shares.append(cpu_s / took)
                    sizes.append(each * width / sum(one.messages for one in heard))
            found.append(
                {
                    "streams": width,
                    "tokens_per_s": round(statistics.median(rates)),
                    "gateway_cpu_share": round(statistics.median(shares), 2),
                    "events_per_message_to_the_client": round(statistics.median(sizes), 2),
                }
            )
    return found


async def _streams(calls: Gateway, sessions: list[str], tokens: int) -> list[Heard]:
    """A turn of each session, all at once."""
    heard: list[Heard] = []

    async def one(session_id: str) -> None:
        request = turn_request(session_id, tokens).SerializeToString()
        heard.append(await listen(calls.run(request)))

    async with anyio.create_task_group() as tasks:
        for session_id in sessions:
            tasks.start_soon(one, session_id)
    return heard


async def _when_seen(calls: Gateway) -> str:
    """A session of the player's; the gateway may have to hear of it first."""
    with anyio.fail_after(10):
        while True:
            try:
                session_id = await calls.session(MODEL)
                await listen(calls.run(turn_request(session_id, 16).SerializeToString()))
                return session_id
            except aio.AioRpcError as error:
                if error.code() not in (StatusCode.UNAVAILABLE, StatusCode.INVALID_ARGUMENT):
                    raise
                await anyio.sleep(0.1)


# -- unary --------------------------------------------------------------------------------------


async def unary(gateway: Child, rounds: int) -> list[dict[str, Any]]:
    """GetSession calls a second, by callers at once."""
    found = []
    process = psutil.Process(gateway.pid)
    async with aio.insecure_channel(gateway.address) as channel:
        calls = Gateway(channel)
        session_id = await calls.session("sim")
        request = session_pb2.GetSessionRequest(session_id=session_id).SerializeToString()
        for width in (1, 16):
            rates, cpus = [], []
            each = CALLS // width

            async def caller(times: int) -> None:
                for _ in range(times):
                    await calls.get(request)

            for number in range(rounds + 1):
                cpu_s, began = _cpu_s(process), time.perf_counter()
                async with anyio.create_task_group() as tasks:
                    for _ in range(width):
                        tasks.start_soon(caller, each)
                took, cpu_s = time.perf_counter() - began, _cpu_s(process) - cpu_s
                if number:
                    rates.append(each * width / took)
                    cpus.append(cpu_s / (each * width))
            found.append(
                {
                    "callers": width,
                    "calls_per_s": round(statistics.median(rates)),
                    "gateway_cpu_us": _us(statistics.median(cpus)),
                }
            )
    return found


async def measure(rounds: int, parts: list[str]) -> dict[str, Any]:
    """What is asked for, each on the same fleet."""
    report: dict[str, Any] = {}
    async with Cluster(engine="sim", engine_options=ENGINE) as cluster:
        await cluster.start(gateways=1, workers=1)
        gateway = cluster.gateways[0]
        if "turns" in parts:
            report["turns"] = await turns(cluster, rounds)
        if "unary" in parts:
            report["unary"] = await unary(gateway, max(rounds // 20, 3))
        if "relay" in parts:
            await cluster.stop(cluster.workers)
            async with started("loadtest.bench.player", cluster.redis_url):
                report["relay"] = await relay(gateway, max(rounds // 20, 3))
    return report


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--parts", nargs="+", default=["turns", "relay", "unary"])
    options = parser.parse_args()
    sys.stdout.write(json.dumps(anyio.run(measure, options.rounds, options.parts), indent=2) + "\n")


if __name__ == "__main__":
    main()
