"""What journal-before-delivery costs: inter-token time with the group commit and without it.

One replica in this process (real turn runner, journal and store adapter; sim engine at a stated
step time) on a private Valkey, no gRPC. Turns run side by side; each stream notes when its tokens
are released. "Without" is the same replica on a store whose ``append_many`` answers at once
without writing. Both modes alternate in one run, and medians are over all rounds.

    python -m loadtest.bench.group_commit [--turns 1 16 64] [--tokens 150] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import anyio
import anyio.lowlevel
from sessile.v1 import replica_pb2, session_pb2, types_pb2

from statestore.digest import RollingDigest
from statestore.embedded import embedded_server
from statestore.journal import RedisJournal
from statestore.ports import Append, Appended, AppendOutcome, SessionWritten, StoreError
from statestore.records import NewSession, ReplicaRef
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from workers.config import ReplicaSettings
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.engine import SimEngine
from workers.kv.channel import KvServer, pull_pages
from workers.replica import ReplicaAdapters, run_replica
from workers.rpc import GrpcPeers
from workers.service import ReplicaApp
from workers.text.bytes_codec import BytesCodec

TENANT = "bench"
PROMPT = "Measure the time between two tokens."


class Unjournalled(RedisJournal):
    """Acknowledges appends without writing them: the bound that no journal can beat."""

    async def append_many(self, appends: Sequence[Append]) -> list[AppendOutcome | StoreError]:
        await anyio.lowlevel.checkpoint()
        return [Appended(append.head) for append in appends]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    turns: tuple[int, ...]
    tokens: int
    rounds: int
    step_ms: float


@dataclass(slots=True)
class Gaps:
    """Seconds between releases of consecutive tokens of one stream, over all streams."""

    seconds: list[float]

    def report(self) -> dict[str, float]:
        ordered = sorted(self.seconds)
        return {
            "mean_ms": round(statistics.fmean(ordered) * 1000, 3),
            "p50_ms": round(ordered[len(ordered) // 2] * 1000, 3),
            "p99_ms": round(ordered[len(ordered) * 99 // 100] * 1000, 3),
        }


@asynccontextmanager
async def replica(
    url: str, journalled: bool, settings: Settings, name: str
) -> AsyncIterator[tuple[ReplicaApp, ReplicaRef]]:
    """One replica, reachable in this process."""
    executor = await connect(url)
    timing = SimTiming(step_ms=settings.step_ms, decode_token_ms=0, prefill_token_ms=0)
    most = max(settings.turns)
    config = SimConfig(timing=timing, eos_probability=0, max_running=most, max_queued=most)
    channel, peers = KvServer("127.0.0.1", 0), GrpcPeers()
    adapters = ReplicaAdapters(
        store=RedisJournal(executor) if journalled else Unjournalled(executor),
        engine=SimEngine(config, anyio.current_time),
        codec=BytesCodec(),
        tickets=channel,
        peers=peers,
        pull_pages=pull_pages,
        random=random.Random(1),
    )
    started: list[tuple[ReplicaApp, ReplicaRef]] = []
    stop, ready = anyio.Event(), anyio.Event()

    async def serve(app: ReplicaApp, ref: ReplicaRef) -> None:
        started.append((app, ref))
        ready.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_replica, adapters, ReplicaSettings(name), "127.0.0.1:1", serve, stop)
        await ready.wait()
        yield started[0]
        stop.set()
    channel.close()
    await peers.aclose()
    await executor.aclose()


async def measure_round(
    store: RedisStore, app: ReplicaApp, ref: ReplicaRef, settings: Settings, turns: int, name: str
) -> Gaps:
    """Runs ``turns`` turns side by side and collects the gaps of all their streams."""
    salt = await store.tenant_salt(TENANT)
    requests = [
        await _open(store, ref, salt, f"ses_{name}{index}", settings.tokens)
        for index in range(turns)
    ]
    gaps = Gaps([])

    async def follow(request: replica_pb2.DispatchTurnRequest) -> None:
        last, count = 0.0, 0
        async with aclosing(app.dispatch_turn(request)) as stream:
            async for message in stream:
                now = anyio.current_time()
                fresh = sum(len(event.tokens.token_ids) for event in message.events)
                if fresh and last:
                    # Tokens that arrive together share the time since the last release.
                    gaps.seconds.extend([(now - last) / fresh] * fresh)
                if fresh:
                    last, count = now, count + fresh
        if count != settings.tokens:
            raise AssertionError(f"{count} of {settings.tokens} tokens arrived")

    async with anyio.create_task_group() as tasks:
        for request in requests:
            tasks.start_soon(follow, request)
    return gaps


async def _open(
    store: RedisStore, ref: ReplicaRef, salt: bytes, session_id: str, tokens: int
) -> replica_pb2.DispatchTurnRequest:
    preamble = session_pb2.OpenSessionRequest().SerializeToString()
    root = RollingDigest(salt).position().digest
    opened = await store.open_session(NewSession(session_id, TENANT, "sim", preamble, root))
    assert isinstance(opened, SessionWritten), opened
    placed = await store.place(session_id, opened.session.epoch, ref, os.urandom(8))
    assert isinstance(placed, SessionWritten), placed
    epoch = placed.session.epoch
    turn = types_pb2.RunTurnRequest(session_id=session_id, turn_id="t")
    turn.messages.add(role=types_pb2.Message.ROLE_USER, content=PROMPT)
    turn.params.max_tokens, turn.params.ignore_eos = tokens, True
    return replica_pb2.DispatchTurnRequest(
        turn=turn,
        epoch=types_pb2.Epoch(number=epoch.number, nonce=epoch.nonce),
        replica=types_pb2.ReplicaRef(replica_id=ref.replica_id, incarnation=ref.incarnation),
        tenant=TENANT,
    )


async def measure(settings: Settings) -> dict[str, object]:
    """All rounds; journalled and not, in turn."""
    rows: list[dict[str, object]] = []
    async with embedded_server() as url:
        executor = await connect(url)
        store = RedisStore(executor)
        async with (
            replica(url, True, settings, "on") as on,
            replica(url, False, settings, "off") as off,
        ):
            for turns in settings.turns:
                seen = {"on": Gaps([]), "off": Gaps([])}
                for number in range(settings.rounds):
                    for mode, running in (("on", on), ("off", off)):
                        name = f"{mode}{turns}x{number}x"
                        gaps = await measure_round(store, *running, settings, turns, name)
                        seen[mode].seconds.extend(gaps.seconds)
                with_commit, without = seen["on"].report(), seen["off"].report()
                added = {key: round(with_commit[key] - without[key], 3) for key in with_commit}
                rows.append({"turns": turns, "on": with_commit, "off": without, "added": added})
        await executor.aclose()
    return {
        "benchmark": "group_commit",
        "step_ms": settings.step_ms,
        "tokens_per_turn": settings.tokens,
        "rounds": settings.rounds,
        "rows": rows,
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=20.0)
    args = parser.parse_args()
    settings = Settings(tuple(args.turns), args.tokens, args.rounds, args.step_ms)
    print(json.dumps(anyio.run(measure, settings), indent=2))


if __name__ == "__main__":
    main()
