"""What gateways remember of owners and tenants, while ownership changes behind their backs.

Two gateways with room for two sessions each serve four sessions of two tenants; sessions are taken,
unplaced, suspended and closed through the store or the other gateway, and replicas die. A stale
entry may cost a NOT_OWNER answer, never more: each turn runs once, on the replica that the store
names, and another tenant is told what it would be told of a session that never was (I3, I10)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sessile.v1 import session_pb2

from gateway.app.directory import unknown_session
from gateway.config import GatewayConfig, Tables
from gateway.core.errors import NotFound, SessionClosed, SessionSuspended
from loadtest.simulation.loop import run
from statestore.ports import EpochLost, SessionWritten
from statestore.records import SessionState, TurnStatus
from tests.support.gateway_world import World, world
from tests.support.nightly import examples

TENANTS = ("acme", "other")
REPLICAS = ("a", "b", "c")
SESSIONS = 4
MOST_DISPATCHES = 3
"""Of one turn: to a former owner, to one that died, to the owner."""


@dataclass
class Known:
    """A session as the model has it."""

    session_id: str
    tenant: str
    state: SessionState = SessionState.OPEN
    turns: list[str] = field(default_factory=list)


Move = tuple[str, int, int, int]
"""What, which session, through which gateway, to which replica."""
NAMES = ["turn"] * 4 + ["take", "take", "take_for_nobody", "kill", "suspend", "resume", "close"]
MOVES = st.tuples(
    st.sampled_from([*NAMES, "intrude", "intrude"]),
    st.integers(0, SESSIONS - 1),
    st.integers(0, 1),
    st.integers(0, len(REPLICAS) - 1),
)


class Player:
    """Carries out moves and says what must come of them."""

    def __init__(self, made: World, sessions: list[Known]) -> None:
        self._world = made
        self._sessions = sessions

    async def play(self, move: Move) -> None:
        name, session, gateway, replica = move
        action: Callable[[Known, int, str], Awaitable[None]] = getattr(self, name)
        await action(self._sessions[session], gateway, REPLICAS[replica])

    async def turn(self, known: Known, gateway: int, replica: str) -> None:
        del replica
        made, turn_id = self._world, f"t{len(known.turns)}"
        before = self._dispatches()
        client = made.turn(known.session_id, turn_id, gateway=gateway, tenant=known.tenant)
        await made.finish(client)
        if known.state is SessionState.SUSPENDED:
            assert isinstance(client.error, SessionSuspended)
            return
        if known.state is SessionState.CLOSED:
            assert isinstance(client.error, SessionClosed)
            return
        assert client.error is None
        known.turns.append(turn_id)
        assert self._dispatches() - before <= MOST_DISPATCHES
        await made.check_gapless(client, known.session_id, turn_id)
        stored = await made.session(known.session_id)
        turn = await made.store.get_turn(known.session_id, turn_id)
        assert stored.owner is not None
        assert turn is not None
        assert (turn.status, turn.attempt) == (TurnStatus.COMMITTED, 1)
        assert turn.attempt_replica == stored.owner.replica
        ran_on = client.only("accepted")[-1].accepted.replica
        assert (ran_on.replica_id, ran_on.incarnation) == (
            stored.owner.replica.replica_id,
            stored.owner.replica.incarnation,
        )

    async def intrude(self, known: Known, gateway: int, replica: str) -> None:
        """Another tenant, which knows the id."""
        del replica
        made, before = self._world, self._dispatches()
        stranger = TENANTS[1 - TENANTS.index(known.tenant)]
        app = made.gateways[gateway]
        client = await made.finish(
            made.turn(known.session_id, "x", gateway=gateway, tenant=stranger)
        )
        told = [client.error]
        for call in (
            app.sessions.get(stranger, session_pb2.GetSessionRequest(session_id=known.session_id)),
            app.sessions.close(
                stranger, session_pb2.CloseSessionRequest(session_id=known.session_id)
            ),
            app.sessions.cancel_turn(
                stranger,
                session_pb2.CancelTurnRequest(session_id=known.session_id, turn_id="t0"),
            ),
        ):
            try:
                await call
            except NotFound as error:
                told.append(error)
        assert [type(error) for error in told] == [NotFound] * 4
        never = unknown_session(known.session_id)
        assert {str(error) for error in told} == {str(never)}
        assert {error.reason for error in told if error} == {never.reason}
        assert self._dispatches() == before
        assert await made.store.get_turn(known.session_id, "x") is None

    async def take(self, known: Known, gateway: int, replica: str) -> None:
        """By some other gateway."""
        del gateway
        ref = self._world.fleet.replicas[replica].ref
        session = await self._world.session(known.session_id)
        await self._world.store.take(known.session_id, session.epoch, ref, _nonce(session.version))
        late = await self._world.store.take(
            known.session_id, session.epoch, ref, _nonce(session.version + 1)
        )
        if known.state is SessionState.OPEN:
            assert isinstance(late, EpochLost), "an epoch was granted twice"

    async def take_for_nobody(self, known: Known, gateway: int, replica: str) -> None:
        del gateway, replica
        session = await self._world.session(known.session_id)
        await self._world.store.take(known.session_id, session.epoch, None, _nonce(session.version))

    async def kill(self, known: Known, gateway: int, replica: str) -> None:
        """A process ends, and its name comes back as the next incarnation."""
        del known, gateway
        self._world.fleet.replicas[replica].dead = True
        await self._world.fleet.start(replica)
        await anyio.sleep(1.5)

    async def suspend(self, known: Known, gateway: int, replica: str) -> None:
        del gateway, replica
        outcome = await self._world.store.suspend(known.session_id)
        if known.state is not SessionState.CLOSED:
            assert isinstance(outcome, SessionWritten)
            known.state = SessionState.SUSPENDED

    async def resume(self, known: Known, gateway: int, replica: str) -> None:
        del replica
        request = session_pb2.ResumeSessionRequest(session_id=known.session_id)
        if known.state is SessionState.SUSPENDED:
            await self._world.gateways[gateway].sessions.resume(known.tenant, request)
            known.state = SessionState.OPEN

    async def close(self, known: Known, gateway: int, replica: str) -> None:
        del replica
        request = session_pb2.CloseSessionRequest(session_id=known.session_id)
        await self._world.gateways[gateway].sessions.close(known.tenant, request)
        known.state = SessionState.CLOSED

    def _dispatches(self) -> int:
        return sum(len(r.dispatches) for r in self._world.fleet.replicas.values())


def _nonce(number: int) -> bytes:
    return number.to_bytes(8, "big")


async def play(moves: list[Move]) -> None:
    config = GatewayConfig(tables=Tables(owners=2))
    async with world(gateways=2, config=config, a=2, b=2, c=2) as made:
        sessions = []
        for number in range(SESSIONS):
            tenant = TENANTS[number % 2]
            sessions.append(Known(await made.open(f"r{number}", tenant), tenant))
        player = Player(made, sessions)
        for move in moves:
            await player.play(move)
        for known in sessions:
            for gateway in (0, 1):
                await player.turn(known, gateway, "")
                await player.intrude(known, gateway, "")


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(MOVES, min_size=5, max_size=25))
def test_a_stale_cache_costs_a_detour_and_nothing_else(moves: list[Move]) -> None:
    run(lambda: play(moves))
