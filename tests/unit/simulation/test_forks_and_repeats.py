"""Forks that lose or gain tokens, and repeats that are applied again, are named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.simulation.checkers.forks import Forks, _check_reading
from loadtest.simulation.checkers.parking import Parking
from loadtest.simulation.checkers.repeats import judged_repeats
from statestore import keys
from statestore.executor import Script, ScriptCall
from statestore.redis_store import RedisStore
from tests.support.owners import STOP, Owner, session_of
from tests.support.stores import SimulatedBackend, store_on

pytestmark = pytest.mark.anyio
CHILD = "ses_f.c"


class Scene:
    """A store in process; as much of a world as these checkers look at."""

    def __init__(self) -> None:
        backend = SimulatedBackend()
        self.server = backend.executor
        self.store: RedisStore = store_on(backend)
        self.violations: list[str] = []
        self.engine = SimpleNamespace(max_context_tokens=400, eos_probability=0.0)
        self.world: Any = self

    def run(self, name: str, source: str, *key_names: str) -> None:
        self.server.run_now(ScriptCall(Script(name, source), key_names, ("x",)))


async def forked(scene: Scene) -> Owner:
    """A parent of one turn that goes on after it was forked."""
    parent = await Owner.of(scene.store)
    await parent.run_turn("t1", [4])
    await scene.store.fork("ses_f", CHILD, None, ())
    await parent.run_turn("t2", [5])
    child = await Owner.of(scene.store, CHILD)
    await child.begun("t1", ())
    await child.write(commit=STOP)
    return child


async def test_a_fork_has_its_parents_tokens_up_to_the_point_and_then_its_own() -> None:
    scene = Scene()
    forks = Forks(scene.world)
    with forks.watched():
        child = await forked(scene)
        await child.begun("t2", [7, 8])
        await scene.store.close("ses_f", 0)
    assert not forks.violations
    assert forks.tokens(CHILD) == [1, 2, 3, 4, 7, 8]


async def test_tokens_that_a_fork_loses_are_noticed() -> None:
    scene = Scene()
    forks = Forks(scene.world)
    with forks.watched():
        await forked(scene)
        shorter = "redis.call('SET', KEYS[2], redis.call('GETRANGE', KEYS[2], '0', '7'))"
        for _ in range(2):
            scene.run("append", shorter, keys.session_key(CHILD), keys.ledger_key("ses_f"))
    assert [what.partition(":")[2][:4] for what in forks.violations] == [" P7:"]


async def test_a_fork_that_is_read_past_its_point_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene()
    forks = Forks(scene.world)
    with forks.watched():
        await forked(scene)
    session = await session_of(scene.store, CHILD)
    read = scene.store.read_tokens

    async def past(session: Any, start: int, end: int, known: Any = None) -> list[int]:
        tokens = await read(session, start, end, known)
        return [*tokens, 5] if end > 2 else tokens

    monkeypatch.setattr(scene.store, "read_tokens", past)
    (wrong,) = await _check_reading(scene.world, forks, session)
    assert wrong.startswith("P7: forked at 4")


async def test_a_repeat_that_changes_nothing_is_right_and_one_that_does_is_not() -> None:
    scene = Scene()
    with judged_repeats(scene.world):
        owner = await Owner.of(scene.store)
        await owner.begun()
        append = owner.append(4)
        saved = scene.server.snapshot()
        for _ in range(2):
            await scene.store.append_many([append])
        scene.server.restore(saved)
        await scene.store.append_many([append])
        assert not scene.violations
        again = "redis.call('APPEND', KEYS[2], 'abcd') return {'appended'}"
        for _ in range(2):
            scene.run("append", again, keys.session_key("ses_f"), keys.ledger_key("ses_f"))
    assert scene.violations == ["ses_f: P3: append was applied again when it was repeated"]


@pytest.mark.parametrize(
    ("released", "parked", "wrong"), [(3, True, 1), (2, True, 0), (3, False, 0)]
)
def test_a_turn_parked_with_nothing_unacknowledged_is_noticed(
    released: int, parked: bool, wrong: int
) -> None:
    run = SimpleNamespace(
        opened=object(),
        released=released,
        output=SimpleNamespace(tokens=[1, 2, 3]),
        _generation=SimpleNamespace(_id="g"),
    )
    replica = SimpleNamespace(
        name="r1",
        app=SimpleNamespace(_runs=SimpleNamespace(_runs={"s": run})),
        engine=SimpleNamespace(
            _scheduler=SimpleNamespace(_by_id={"g": SimpleNamespace(parked=parked)})
        ),
    )
    world: Any = SimpleNamespace(live_replicas=lambda: [replica])
    parking = Parking(world)
    parking.sample()
    assert not parking.violations
    for _ in range(3):
        parking.sample()
    assert len(parking.violations) == wrong
