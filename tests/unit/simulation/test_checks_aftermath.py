"""After the faults: each thing that is left, gone or held wrongly is told by its rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from sessile.v1 import session_pb2

from loadtest.simulation.checkers import aftermath
from loadtest.simulation.checkers.finality import UNREPAIRED, made_final
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.world import World
from statestore import keys
from statestore.records import ReplicaRef, Session, SessionState, Turn
from tests.unit.simulation.small_world import ENGINE, SALT, Told, asked, lone, told

OWNER = ReplicaRef("r1", 1)


def usual() -> Told:
    return told(asked("t0", "look", max_tokens=9), asked("t1", "and", max_tokens=9))


@dataclass
class Store:
    """What the checkers ask of the real one."""

    told: dict[str, Told] = field(default_factory=dict)

    async def get_session(self, session_id: str) -> Session | None:
        it = self.told.get(session_id)
        return None if it is None else it.session

    async def read_tokens(self, session: Session, start: int, end: int) -> Sequence[int]:
        return self.told[session.session_id].ledger[start:end]

    async def get_turns(self, session: Session, first: int, count: int) -> Sequence[Turn]:
        return self.told[session.session_id].turns[first : first + count]

    async def tenant_salt(self, tenant: str) -> bytes:
        return SALT


@dataclass
class Engine:
    """Names a page by the tokens up to its end."""

    held: set[bytes] = field(default_factory=set)
    load_now: Any = field(
        default_factory=lambda: SimpleNamespace(
            running=0, queued=0, free_pages=ENGINE.capacity_pages
        )
    )
    broken: bool = False

    def block_hashes(self, salt: bytes, tokens: Sequence[int]) -> list[bytes]:
        return [repr(list(tokens[:end])).encode() for end in range(16, len(tokens) + 1, 16)]

    def resident_pages(self, names: Sequence[bytes]) -> int:
        return sum(name in self.held for name in names)

    def load(self) -> Any:
        return self.load_now

    def check_integrity(self) -> None:
        if self.broken:
            raise AssertionError("the books do not balance")


@dataclass
class SmallWorld:
    store: Store = field(default_factory=Store)
    stored: dict[str, object] = field(default_factory=dict)
    replica: Any = field(
        default_factory=lambda: SimpleNamespace(
            name="r1",
            ref=OWNER,
            engine=Engine(),
            app=SimpleNamespace(session_ids=lambda: frozenset({"ses_a"})),
        )
    )

    def seen(self) -> World:
        world = SimpleNamespace(
            store=self.store,
            server=SimpleNamespace(peek=self.stored.get),
            engine=ENGINE,
            replicas={"r1": self.replica},
            live_replicas=lambda: [self.replica],
            coverage={UNREPAIRED: 0},
            losing=anyio.Lock(),
        )
        return cast(World, world)

    def agent(self, it: Told | None, name: str = "a0", **fields: Any) -> Agent:
        """The client of a session, which the store has."""
        known: dict[str, Any] = {"session_id": "ses_a"}
        if it is not None:
            known = {"session_id": it.session.session_id, "turns": [*it.heard]}
            self.store.told[it.session.session_id] = it
        return lone(Agent, self.seen(), name, **known | fields)


def named(it: Told, session_id: str, **fields: Any) -> Told:
    session = replace(it.session, session_id=session_id, **fields)
    return replace(it, session=session)


def check_agent(small: SmallWorld, agent: Agent) -> list[str]:
    async def check() -> list[str]:
        return await aftermath.check_agent(small.seen(), agent)

    return anyio.run(check)


def test_a_session_as_its_client_knows_it_is_right() -> None:
    small = SmallWorld()
    assert check_agent(small, small.agent(usual())) == []


@pytest.mark.parametrize("purged", [False, True])
def test_what_was_wrong_with_a_stream_is_told_though_its_session_is_gone(purged: bool) -> None:
    small, it = SmallWorld(), usual()
    it.heard[0].violations.append("I2: finished twice")
    agent = small.agent(it, purged=purged, violations=["I9: before"])
    small.store.told.clear()
    found = check_agent(small, agent)
    assert "a0 (ses_a): I9: before" in found
    assert "a0 (ses_a): t0: I2: finished twice" in found
    assert any("P2: the session is gone" in what for what in found) is not purged


def test_a_purged_session_leaves_nothing_but_what_forks_need() -> None:
    small = SmallWorld(stored={keys.ledger_key("ses_a"): b"tokens"})
    agent = small.agent(None, purged=True)
    assert check_agent(small, agent) == [
        f"a0 (ses_a): I9: it was purged, {keys.ledger_key('ses_a')} is there"
    ]
    small.stored[keys.refs_key("ses_a")] = {b"n:ses_a": b"1"}
    assert check_agent(small, agent) == []


def check_closed(small: SmallWorld, *others: Agent) -> list[str]:
    async def check() -> list[str]:
        closed = small.agent(usual(), closed=True)
        tokens = small.store.told["ses_a"].ledger
        small.replica.engine.held = {*small.replica.engine.block_hashes(SALT, tokens)[:1]}
        return await aftermath.check_closed(small.seen(), [closed, *others], closed, OWNER)

    return anyio.run(check)


def test_an_owner_keeps_no_pages_of_a_closed_session_but_those_of_others() -> None:
    small, ledger = SmallWorld(), list(usual().ledger)
    assert any("I9: closed" in what for what in check_closed(small))
    other = small.agent(named(usual(), "ses_b"), "a1")
    assert check_closed(small, other) == []
    small.store.told.pop("ses_b")
    purged = small.agent(None, "a1", purged=True, session_id="ses_b", said=ledger)
    assert check_closed(small, purged) == []


def test_a_purged_session_hides_no_pages_that_are_not_its_own() -> None:
    small = SmallWorld()
    purged = small.agent(None, "a1", purged=True, session_id="ses_b", said=[1] * 40)
    assert any("I9: closed" in what for what in check_closed(small, purged))
    purged.said_more = True  # nobody knows what
    assert check_closed(small, purged) == []


@pytest.mark.parametrize(
    ("load", "broken", "rule"),
    [
        ({"running": 0, "queued": 0, "free_pages": ENGINE.capacity_pages}, False, ""),
        ({"running": 1, "queued": 0, "free_pages": ENGINE.capacity_pages}, False, "I7"),
        ({"running": 0, "queued": 2, "free_pages": ENGINE.capacity_pages}, False, "I7"),
        ({"running": 0, "queued": 0, "free_pages": ENGINE.capacity_pages - 1}, False, "I9"),
        ({"running": 0, "queued": 0, "free_pages": ENGINE.capacity_pages}, True, "P13"),
    ],
)
def test_an_idle_replica_runs_and_holds_nothing(
    load: dict[str, int], broken: bool, rule: str
) -> None:
    small = SmallWorld()
    small.replica.engine = Engine(load_now=SimpleNamespace(**load), broken=broken)
    found = aftermath.check_replicas(small.seen())
    assert [what.split(": ")[1] for what in found] == ([rule] if rule else [])


def test_a_closed_session_is_on_no_replica() -> None:
    small = SmallWorld()
    agent = small.agent(usual())
    assert aftermath.check_gone(small.seen(), [agent]) == []
    agent.closed = True
    assert "I9: closed" in aftermath.check_gone(small.seen(), [agent])[0]


def of_two(check: Any, first: Told, second: Told) -> list[str]:
    async def judge() -> list[str]:
        small = SmallWorld()
        agents = [small.agent(first, "a0"), small.agent(second, "a1")]
        found: list[str] = await check(small.seen(), agents)
        return found

    return anyio.run(judge)


def test_sessions_draw_noise_of_their_own_unless_their_clients_chose_it() -> None:
    drawn = told(asked("t0", "look", max_tokens=9))
    assert "P20" in of_two(aftermath.check_seeds, drawn, named(drawn, "ses_b"))[0]
    chosen = told(asked("t0", "look", max_tokens=9, seed=4))
    assert of_two(aftermath.check_seeds, chosen, named(chosen, "ses_b")) == []
    seeded = session_pb2.OpenSessionRequest()
    seeded.default_params.seed = 4
    both = [named(drawn, name, preamble=seeded.SerializeToString()) for name in ("ses_a", "ses_b")]
    assert of_two(aftermath.check_seeds, both[0], both[1]) == []
    forks = [named(it, it.session.session_id, parent_id="ses_p") for it in both]
    assert "P20" in of_two(aftermath.check_seeds, forks[0], forks[1])[0]


@pytest.mark.parametrize(
    ("tenant", "digest", "right"),
    [("acme", b"x", True), ("acme", b"y", False), ("bravo", b"y", True), ("bravo", b"x", False)],
)
def test_leading_messages_are_named_alike_for_one_tenant_only(
    tenant: str, digest: bytes, right: bool
) -> None:
    first = named(usual(), "ses_a", leading_digest=b"x")
    second = named(usual(), "ses_b", leading_digest=digest, tenant=tenant)
    found = of_two(aftermath.check_named_apart, first, second)
    assert [": P19: " in what for what in found] == ([] if right else [True])


def closing(agent: Agent, small: SmallWorld, after: Told) -> None:
    """The client closes its session, and the store has it like this then."""

    async def close() -> None:
        async with made_final(agent):
            small.store.told["ses_a"] = after

    anyio.run(close)


def test_only_what_was_missing_before_a_close_is_given_up() -> None:
    whole = usual()
    behind = replace(whole, turns=whole.turns[:1])
    closed = replace(behind, session=replace(whole.session, state=SessionState.CLOSED))
    cases = [
        (behind, closed, True, [False, True]),
        (behind, replace(closed, turns=whole.turns), True, [False, False]),  # its owner was asked
        (whole, closed, True, [False, False]),  # the close itself loses it: that is judged
        (behind, behind, True, [False, False]),  # it was refused: its owner can put it back
        (behind, closed, False, [False, False]),
    ]
    for before, after, lossy, given_up in cases:
        small = SmallWorld()
        agent = small.agent(before, lossy=lossy, turns=[replace(it) for it in whole.heard])
        closing(agent, small, after)
        assert [heard.given_up for heard in agent.turns] == given_up


@pytest.mark.parametrize(
    ("kinds", "losses", "wrong"),
    [
        (("lose_writes",), 0, 0),
        (("lose_writes",), 1, 1),
        (("lose_writes", "kill_replica"), 1, 0),
        (("lose_writes_and_owner",), 1, 0),
    ],
)
def test_no_client_is_told_of_a_loss_while_every_owner_lives(
    kinds: tuple[str, ...], losses: int, wrong: int
) -> None:
    agent = SmallWorld().agent(usual(), lossy=True, losses=losses)
    assert len(aftermath.check_losses(kinds, [agent], lambda _: True)) == wrong


@pytest.mark.parametrize(("kind", "wrong"), [("lose_writes", 1), ("lose_writes_and_owner", 0)])
def test_nothing_is_made_final_before_it_is_put_back_while_every_owner_lives(
    kind: str, wrong: int
) -> None:
    agent = SmallWorld().agent(usual(), lossy=True)
    agent.world.coverage[UNREPAIRED] += 1
    assert len(aftermath.check_losses((kind,), [agent], lambda _: True)) == wrong


@pytest.mark.parametrize(("losses", "wrong"), [(0, 0), (1, 1)])
def test_a_loss_is_told_only_where_there_was_one(losses: int, wrong: int) -> None:
    agent = SmallWorld().agent(usual(), lossy=True, losses=losses)
    kinds = ("kill_replica", "lose_writes")
    found = aftermath.check_losses(kinds, [agent], lambda _: False)
    assert len(found) == wrong
    assert all("P1: " in what for what in found)
