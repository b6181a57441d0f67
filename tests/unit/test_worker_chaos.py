"""Replicas under random kills, thefts, cancels and store faults: nothing is lost or repeated.

A driver does what a gateway does, only dumber: it dispatches wherever the session is, and takes it
for a random replica when that fails.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import anyio
import pytest
from sessile.v1 import types_pb2

from gateway.core import errors
from loadtest.simulation.loop import run
from loadtest.simulation.redis import Fault
from statestore.ports import EpochLost, SessionWritten, StoreUnavailable
from tests.support.replica_world import SESSION, Heard, RunningReplica, World, listen, world
from workers.config import TurnLimits
from workers.engines.port import Sampling
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.model import expected_output

TURNS = 4
OUTPUT = 40
FAULTS = [Fault.NONE] * 6 + [Fault.REQUEST_LOST, Fault.REPLY_LOST]
RETRIED = (errors.Unavailable, errors.NotOwner, errors.Overloaded, StoreUnavailable)


@dataclass
class Client:
    """One agent: runs its turns in order, through whatever happens."""

    w: World
    draw: random.Random
    alive: list[RunningReplica]
    heard: list[Heard] = field(default_factory=list)

    async def run_turns(self) -> None:
        for number in range(TURNS):
            self.heard.append(await self.run_turn(f"t{number}"))

    async def run_turn(self, turn_id: str) -> Heard:
        heard = Heard()
        while True:
            try:
                replica = await self.owner()
                request = await self.w.request(
                    replica, f"Go on with {turn_id}", turn_id, params={"max_tokens": OUTPUT}
                )
                if heard.tokens:
                    request.turn.resume_from.CopyFrom(heard.end)
                await self.follow(replica, request, heard)
            except RETRIED:
                await anyio.sleep(self.draw.uniform(0, 0.5))
            else:
                return heard

    async def follow(self, replica: RunningReplica, request: object, heard: Heard) -> None:
        """Checks that each attempt goes on exactly where the last one stopped."""
        part = Heard()

        async def check() -> None:
            for event in part.events:
                if event.HasField("tokens") and heard.tokens:
                    assert event.tokens.position == heard.end.length
                if not (event.HasField("accepted") and heard.events):
                    heard.events.append(event)
            part.events.clear()

        await listen(replica, request, part, between=check)  # type: ignore[arg-type]

    async def owner(self) -> RunningReplica:
        session = await self.w.session()
        for replica in self.alive:
            if session.owner is not None and session.owner.replica == replica.ref:
                return replica
        replica = self.draw.choice(self.alive)
        change = self.w.store.place if session.owner is None else self.w.store.take
        outcome = await change(SESSION, session.epoch, replica.ref, self.w.nonce())
        if isinstance(outcome, EpochLost):
            raise errors.NotOwner("somebody was faster")
        assert isinstance(outcome, SessionWritten)
        return replica


async def vex(w: World, draw: random.Random, alive: list[RunningReplica]) -> None:
    """One bad thing after another."""
    for number in range(12):
        await anyio.sleep(draw.uniform(0.05, 0.6))
        match draw.choice(["kill", "steal", "lose", "heal", "pages"]):
            case "kill":
                victim = alive.pop(draw.randrange(len(alive)))
                await victim.kill()
                w.executor.fault = lambda call: Fault.NONE
                alive.append(await w.start(f"new{number}"))
            case "steal":
                try:
                    session = await w.session()
                    thief = draw.choice(alive).ref
                    await w.store.take(SESSION, session.epoch, thief, w.nonce())
                except StoreUnavailable:
                    continue
            case "lose":
                w.executor.fault = lambda call: draw.choice(FAULTS)
            case "heal":
                w.executor.fault = lambda call: Fault.NONE
            case "pages":
                w.channel.failures = draw.randrange(3)
    w.executor.fault = lambda call: Fault.NONE


CONFIG = SimConfig(timing=SimTiming(step_ms=20), eos_probability=0)
LIMITS = TurnLimits(waiting_interval_s=0.5, open_timeout_s=3.0)


@pytest.mark.parametrize("seed", range(24))
def test_every_turn_says_what_one_undisturbed_replica_would(seed: int) -> None:
    async def main() -> None:
        draw = random.Random(seed)
        async with world(CONFIG, LIMITS) as w:
            alive = [await w.start(f"r{number}") for number in range(3)]
            await w.open()
            client = Client(w, draw, alive)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vex, w, draw, alive)
                await client.run_turns()
            ledger = await w.ledger()
            for heard in client.heard:
                start, end = heard.accepted.output_start.length, heard.finished.end.length
                said = expected_output(ledger[:start], OUTPUT, Sampling(), 0.0)
                assert heard.finished.text_end == len(heard.text)
                assert heard.tokens == ledger[start:end] == said[: end - start]
                if heard.finished.status == types_pb2.TURN_STATUS_FAILED:
                    # Taken away twice before it said anything: the rule against poison turns.
                    assert "attempts in a row" in heard.finished.error
                else:
                    assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
                    assert heard.tokens == said
            assert len(await w.store.get_turns(await w.session(), 0, 99)) == TURNS

    run(main, seed)


@pytest.mark.parametrize("seed", range(12))
def test_a_store_that_forgets_is_repaired_by_the_owner(seed: int) -> None:
    """Without kills: the owner always holds what the store loses, so nobody sees DATA_LOSS."""

    async def main() -> None:
        draw = random.Random(seed)
        async with world(CONFIG, LIMITS) as w:
            alive = [await w.start("r0")]
            await w.open()
            client = Client(w, draw, alive)
            await client.owner()
            kept = w.executor.snapshot()

            async def forget() -> None:
                nonlocal kept
                for _ in range(8):
                    await anyio.sleep(draw.uniform(0.1, 0.5))
                    kept = draw.choice([kept, w.executor.snapshot()])
                    await anyio.sleep(draw.uniform(0.05, 0.3))
                    w.executor.restore(kept)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(forget)
                await client.run_turns()
                tasks.cancel_scope.cancel()
            client.heard.append(await client.run_turn("after the last loss"))
            ledger = await w.ledger()
            for heard in client.heard:
                start = heard.accepted.output_start.length
                assert heard.tokens == ledger[start : start + OUTPUT]
                assert heard.tokens == expected_output(ledger[:start], OUTPUT, Sampling(), 0.0)

    run(main, seed)
