"""How long a client waits for its next token when the replica of its turn is killed.

Real processes: a private Valkey, workers with the sim engine at a stated step time, one gateway;
the client is plain gRPC. Each round runs a turn, kills (SIGKILL) the worker that serves it at a
random moment, and measures at the client

* ``gap_ms``: from the last token before the fail-over to the first one after it, and
* ``kill_to_token_ms``: from the kill to the first token after it.

Beside the work of the gateway and of the new worker, the gap holds what neither can shorten: the
operating system takes the killed process apart before it closes its sockets, and the engine
computes the whole context again (its first step: ``step_ms`` and ``prefill_token_ms`` a token).

Every round also checks that positions are contiguous and that the turn finishes. Killed workers are
replaced before the next round. Prints JSON: quote it with the machine it ran on.

    python -m loadtest.bench.failover --kills 100
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import anyio
from grpc import aio
from sessile.v1 import fleet_pb2, fleet_pb2_grpc, session_pb2, session_pb2_grpc, types_pb2

from gateway.cli.launch import Child, Cluster

MAX_READY_WAIT_S = 60.0
TOKENS_BEFORE_KILL = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    kills: int
    workers: int
    step_ms: float
    prefill_token_ms: float
    context_tokens: int
    seed: int


@dataclass(slots=True)
class Round:
    """One kill, as the client saw it (monotonic seconds)."""

    killed_at: float = 0.0
    last_before: float = 0.0
    first_after: float = 0.0
    next_position: int | None = None
    moved: bool = False
    finished: bool = False
    """The turn was committed."""
    gaps_s: float = 0.0
    """Longest pause between two messages with tokens before the kill: the undisturbed pace."""

    def see(self, event: types_pb2.TurnEvent, now: float) -> None:
        """Takes one event; raises AssertionError if a token is missing or repeated."""
        kind = event.WhichOneof("event")
        if kind == "tokens":
            tokens = event.tokens
            if self.next_position is not None:
                assert tokens.position == self.next_position, "a token was lost or repeated"
            self.next_position = tokens.position + len(tokens.token_ids)
            if not self.moved:
                if self.last_before and not self.killed_at:
                    self.gaps_s = max(self.gaps_s, now - self.last_before)
                self.last_before = now
            elif not self.first_after:
                self.first_after = now
        elif kind == "moved":
            self.moved = True
        elif kind == "finished":
            self.finished = event.finished.status == types_pb2.TURN_STATUS_COMMITTED


class Bench:
    """The client and the killer."""

    def __init__(self, settings: Settings, address: str) -> None:
        self._settings = settings
        self._random = random.Random(settings.seed)
        self._channel = aio.insecure_channel(address)
        self._sessions = session_pb2_grpc.SessionServiceStub(self._channel)
        self._fleet = fleet_pb2_grpc.FleetServiceStub(self._channel)

    async def aclose(self) -> None:
        await self._channel.close()

    async def wait_ready(self, count: int) -> None:
        """Until the gateway takes so many replicas for READY."""
        with anyio.fail_after(MAX_READY_WAIT_S):
            while True:
                fleet = await self._fleet.ListReplicas(fleet_pb2.ListReplicasRequest())
                ready = [r for r in fleet.replicas if r.state == fleet_pb2.REPLICA_STATE_READY]
                if len(ready) >= count:
                    return
                await anyio.sleep(0.1)

    async def round(self, number: int, workers: dict[str, Child]) -> tuple[Round, str]:
        """Runs one turn, kills its worker; returns what the client saw and who was killed."""
        prompt = "x" * self._settings.context_tokens
        opened = await self._sessions.OpenSession(
            session_pb2.OpenSessionRequest(request_id=f"round-{number}")
        )
        request = types_pb2.RunTurnRequest(session_id=opened.session.session_id, turn_id="t")
        request.messages.add(role=types_pb2.Message.ROLE_USER, content=prompt)
        request.params.max_tokens = 4 * TOKENS_BEFORE_KILL
        request.params.ignore_eos = True
        kill_after = TOKENS_BEFORE_KILL + self._random.randrange(TOKENS_BEFORE_KILL)
        delay_s = self._random.random() * self._settings.step_ms / 1000
        seen, owner, start = Round(), "", 0

        async def kill() -> None:
            await anyio.sleep(delay_s)
            seen.killed_at = time.perf_counter()
            workers[owner].kill()

        async with anyio.create_task_group() as tasks:
            async for message in self._sessions.RunTurn(request, timeout=60):
                now = time.perf_counter()
                for event in message.events:
                    seen.see(event, now)
                    if event.HasField("accepted"):
                        owner = event.accepted.replica.replica_id
                        start = event.accepted.output_start.length
                position = seen.next_position
                if kill_after and position is not None and position - start >= kill_after:
                    kill_after = 0
                    tasks.start_soon(kill)
        await self._sessions.CloseSession(
            session_pb2.CloseSessionRequest(session_id=opened.session.session_id, purge=True)
        )
        return seen, owner


async def measure(settings: Settings, logs: Path) -> dict[str, object]:
    """Runs all rounds."""
    rounds: list[Round] = []
    options = {
        "step_ms": settings.step_ms,
        "prefill_token_ms": settings.prefill_token_ms,
        "decode_token_ms": 0,
        "eos_probability": 0,
    }
    async with Cluster(
        engine_options={name: str(value) for name, value in options.items()},
        log_directory=logs,
        environment={"OMP_NUM_THREADS": "1", "SESSILE_LOG_LEVEL": "WARNING"},
    ) as cluster:
        await cluster.start(gateways=1, workers=settings.workers)
        workers = {child.name: child for child in cluster.workers}
        bench = Bench(settings, cluster.targets[0])
        try:
            for number in range(settings.kills):
                await bench.wait_ready(settings.workers)
                seen, killed = await bench.round(number, workers)
                rounds.append(seen)
                workers[killed] = await cluster.start_worker(killed)
        finally:
            await bench.aclose()
    return report(settings, rounds)


def report(settings: Settings, rounds: list[Round]) -> dict[str, object]:
    """Percentiles over all rounds; a round whose turn was not moved or not committed is a failure
    and is never dropped silently."""
    good = [r for r in rounds if r.moved and r.finished and r.first_after]
    return {
        "benchmark": "failover",
        "kills": len(rounds),
        "failed_rounds": len(rounds) - len(good),
        "workers": settings.workers,
        "step_ms": settings.step_ms,
        "prefill_token_ms": settings.prefill_token_ms,
        "context_tokens": settings.context_tokens,
        "gap_ms": _percentiles([r.first_after - r.last_before for r in good]),
        "kill_to_token_ms": _percentiles([r.first_after - r.killed_at for r in good]),
        "longest_undisturbed_gap_ms": _percentiles([r.gaps_s for r in good]),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}

    def at(share: float) -> float:
        return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1000, 2)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0)}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--prefill-token-ms", type=float, default=0.01)
    parser.add_argument("--context-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="keep the processes' logs here")
    chosen = parser.parse_args()
    settings = Settings(
        chosen.kills,
        chosen.workers,
        chosen.step_ms,
        chosen.prefill_token_ms,
        chosen.context_tokens,
        chosen.seed,
    )
    with tempfile.TemporaryDirectory(prefix="sessile-failover-") as scratch:
        logs = chosen.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        found = anyio.run(measure, settings, logs, backend_options={"use_uvloop": True})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
