"""Damaged records in the store: whoever reads them gets a clear StoreError or a usable answer, and
no loop of a gateway or worker ends by one."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given

from gateway.core.errors import SessileError
from statestore.keys import session_key
from statestore.ports import StoreError
from statestore.records import Epoch, Lease, ReplicaRef, ReplicaRegistration, SweepReport
from statestore.replica_info import ReplicaDetails, ReplicaLoad
from tests.fuzz.hostile import Hostile, seeds
from tests.fuzz.profile import fuzz
from tests.support.fleets import MODEL
from tests.support.gateway_world import simulated, world
from tests.support.owners import A, Owner, opened
from tests.support.stores import ServerBackend, server_backend, store_on

SESSION, CHILD = "ses_f", "ses_f.c"
DAMAGE = ("flip", "empty", "garbage", "number", "delete", "other type")
GARBAGE = (b"\xff\xfe", b"-1", b"1e999", b"nan", b"\0" * 7, b"9" * 40, b"[[", b"RUNNING", b"{}")


KEYS = {
    "records": (":s:", ":refs", "tenant-salt", "lease"),
    "ledgers": (":l:",),
    "indices": ("-sessions:", "sessile:due"),
    "fleet": ("sessile:fleet",),
}


async def damage_one(backend: ServerBackend, hostile: Hostile, kind_of_key: str) -> str:
    """Damages a field, or a key, of what the store holds; says which."""
    draw, raw = hostile.draw, backend.raw
    marks = KEYS[kind_of_key]
    keys = [key for key in sorted(await backend.keys()) if any(mark in key for mark in marks)]
    key = draw.choice(keys).encode()
    how = draw.choice(DAMAGE)
    kind = await raw.type(key)
    if how == "other type":
        await raw.delete(key)
        await raw.set(key, b"text") if kind != b"string" else await raw.lpush(key, b"x")
        return f"{key!r}: {how}"
    if kind == b"string":
        await raw.set(key, _spoilt(hostile, how, await raw.get(key) or b""))
        return f"{key!r}: {how}"
    if kind == b"zset":
        member = draw.choice(await raw.zrange(key, 0, -1))
        await raw.zadd(key, {_spoilt(hostile, how, member): draw.choice((0, 1e18, -1e18))})
        return f"{key!r}: {how} beside {member!r}"
    field = draw.choice(sorted(await raw.hkeys(key)))
    if how == "delete":
        await raw.hdel(key, field)
    else:
        await raw.hset(key, field, _spoilt(hostile, how, await raw.hget(key, field) or b""))
    return f"{key!r} {field!r}: {how}"


def _spoilt(hostile: Hostile, how: str, value: bytes) -> bytes:
    match how:
        case "flip":
            return hostile.damage(value)
        case "empty":
            return b""
        case "number":
            return str(hostile.integer(-(2**64), 2**64)).encode()
        case _:
            return hostile.draw.choice(GARBAGE)


async def filled(backend: ServerBackend) -> None:
    """A session with turns, one of them running, a fork, a replica, a lease."""
    store = store_on(backend)
    await store.tenant_salt("acme")
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4, 5, 6])
    await owner.run_turn("t2", [7, 8])
    await store.fork(SESSION, CHILD, 1, (("a", "b"),))
    await owner.begun("t3")
    await owner.write(9, 9)
    details = ReplicaDetails("h:1", "m", "sim", "00", "11", 16, 64, 1024, 4, 4).to_json()
    ref = await store.register_replica(ReplicaRegistration("r", details))
    await store.heartbeat(ref, 1, ReplicaLoad().to_json())
    await store.acquire_lease("sweeper", "g", 5000)


Call = Callable[[Any, Owner], Awaitable[object]]
CALLS: dict[str, Call] = {
    "get_session": lambda s, o: s.get_session(SESSION),
    "get child": lambda s, o: s.get_session(CHILD),
    "get_turn": lambda s, o: s.get_turn(SESSION, "t1"),
    "list": lambda s, o: s.list_sessions("acme", "", 100),
    "sessions_of": lambda s, o: s.sessions_of(A, 100),
    "fork": lambda s, o: s.fork(SESSION, "ses_f.d", None, ()),
    "cancel": lambda s, o: s.cancel_turn(SESSION, "t3"),
    "append": lambda s, o: o.write(1),
    "resume": lambda s, o: s.resume_turn(SESSION, o.epoch, "t3"),
    "place": lambda s, o: s.place(SESSION, Epoch(0, b""), A, bytes(8)),
    "take": lambda s, o: s.take(SESSION, o.epoch, ReplicaRef("b", 2), b"12345678"),
    "begin": lambda s, o: o.begin("t9"),
    "migrate": lambda s, o: s.begin_migration(SESSION, o.epoch, "m", ReplicaRef("b", 2), 1000),
    "suspend": lambda s, o: s.suspend(SESSION),
    "fleet": lambda s, o: s.fleet(),
    "register": lambda s, o: s.register_replica(ReplicaRegistration("r", "{}")),
    "heartbeat": lambda s, o: s.heartbeat(ReplicaRef("r", 1), 2, "{}"),
    "lease": lambda s, o: s.acquire_lease("sweeper", "h", 5000),
    "release": lambda s, o: s.release_lease(Lease("sweeper", "g", 1)),
    "salt": lambda s, o: s.tenant_salt("acme"),
    "close": lambda s, o: s.close(SESSION, 0),
    "sweep": lambda s, o: s.sweep(100),
}


async def read_everything(store: Any, session_id: str) -> None:
    session = await store.get_session(session_id)
    if session is not None:
        await store.read_tokens(session, 0, session.head.length)
        await store.get_turns(session, 0, 100)


async def attack(url: str, kind_of_key: str, examples: list[int]) -> list[str]:
    """Damages and uses the store once for each seed; returns what went wrong otherwise than by a
    StoreError."""
    wrong = []
    async with server_backend(url) as backend:
        await filled(backend)
        saved = await backend.save()
        session = await store_on(backend).get_session(SESSION)
        assert session is not None
        for seed in examples:
            hostile = Hostile(seed)
            await backend.roll_back(saved)
            what = await damage_one(backend, hostile, kind_of_key)
            store = store_on(backend)
            owner = Owner(store, SESSION, A, session.epoch)
            owner.turn_id = "t3"
            owner.tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 1, 2, 3, 9, 9]
            calls: list[tuple[str, Call]] = [
                ("read", lambda s, o: read_everything(s, SESSION)),
                ("read child", lambda s, o: read_everything(s, CHILD)),
                *hostile.draw.sample(sorted(CALLS.items()), 6),
            ]
            for name, call in calls:
                try:
                    with anyio.fail_after(20):
                        await call(store, owner)
                except StoreError:
                    pass
                except Exception as error:  # noqa: BLE001 - judged by the caller
                    wrong.append(f"{seed}: {what}: {name}: {error!r}")
    return wrong


BATCH = 20
FOUND: dict[str, tuple[int, ...]] = {
    "records": (18280420580081540063, 100932415370070198, 5738654505267911365),
    "ledgers": (15035193709775551709,),
    "indices": (14922715847065110392,),
    "fleet": (1106634455018142972,),
}
"""Seeds that once showed a defect."""


@pytest.mark.parametrize("kind_of_key", KEYS)
def test_damaged_records_are_store_errors(valkey_url: str, kind_of_key: str) -> None:
    @fuzz(6)
    @given(seeds)
    def fuzzed(seed: int) -> None:
        draw = random.Random(seed)
        batch = [draw.getrandbits(64) for _ in range(BATCH)]
        wrong = anyio.run(attack, valkey_url, kind_of_key, [*FOUND[kind_of_key], *batch])
        assert not wrong, "\n".join(wrong)

    fuzzed()


async def _sweep_beside_a_damaged_session(url: str) -> SweepReport:
    async with server_backend(url) as backend:
        store = store_on(backend)
        for session_id in ("ses_f", "ses_g"):
            await opened(store, session_id)
            await store.close(session_id, 1)
        await backend.raw.delete(session_key("ses_f"))
        await backend.raw.set(session_key("ses_f"), b"damaged")
        await anyio.sleep(0.01)
        return await store.sweep(100)


def test_a_sweep_goes_on_beside_a_damaged_session(valkey_url: str) -> None:
    """Else no turn of anybody is ended at its deadline any more (P4)."""
    report = anyio.run(_sweep_beside_a_damaged_session, valkey_url)
    assert report.sessions_purged == ("ses_g",)


# -- what replicas say about themselves ------------------------------------------------------------

JSON_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1e308, 2**70, "", "x", "zz", "\u0000", [], {}, [1], {"a": None},
    float("nan"), float("inf"), "9" * 400, {"\ud7ff": -5}, ["x"] * 100,
)  # fmt: skip


def hostile_json(hostile: Hostile, honest: str) -> str:
    """A record with some fields of other types, or lost, or no JSON at all."""
    draw = hostile.draw
    if draw.random() < 0.2:
        return draw.choice(("", "null", "[]", "{", '"x"', "[" * 8_000, '{"a":' * 1_600, "NaN"))
    values: dict[str, Any] = json.loads(honest)
    for name in draw.sample(sorted(values), draw.randrange(1, 4)):
        if draw.random() < 0.1:
            del values[name]
        else:
            values[name] = draw.choice(JSON_VALUES)
    if draw.random() < 0.2:
        values["new"] = draw.choice(JSON_VALUES)
    return json.dumps(values)


async def with_a_liar(details: str, load: str) -> None:
    """A gateway between an honest replica and one with these records serves its turns."""
    async with world(r1=20) as made:
        ref = await made.store.register_replica(ReplicaRegistration("liar", details))
        for beat in range(1, 4):
            await made.store.heartbeat(ref, beat, load)
            await anyio.sleep(0.5)
        app = made.gateway
        app.watches.replicas(include_down=True)
        session_id = await made.open()
        assert (await made.session(session_id)).model == MODEL
        client = made.turn(session_id)
        # The liar may be chosen, and nobody answers there: then the turn goes on elsewhere.
        await made.finish(client)
        assert client.error is None or isinstance(client.error, SessileError)
        await app.fleet.refresh()
        assert app.fleet.snapshot.named("r1") is not None


HONEST_DETAILS = ReplicaDetails("h:1", "other", "sim", "00", "11", 16, 64, 1024, 4, 4).to_json()
HONEST_LOAD = ReplicaLoad(leading={"00": 16}).to_json()


def test_a_replica_that_tells_nonsense_harms_no_gateway() -> None:
    @fuzz(60)
    @given(seeds)
    def fuzzed(seed: int) -> None:
        hostile = Hostile(seed)
        honest = json.loads(HONEST_DETAILS)
        honest["model"] = hostile.draw.choice((MODEL, "other"))
        details = hostile_json(hostile, json.dumps(honest))
        load = hostile_json(hostile, HONEST_LOAD)
        if hostile.draw.random() < 0.3:
            details = json.dumps(honest)

        async def test() -> None:
            await with_a_liar(details, load)

        simulated(test)()

    fuzzed()
