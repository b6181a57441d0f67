"""The in-process Redis: conversions, ranges and the strictness that a cluster would show."""

from __future__ import annotations

import pytest

from loadtest.simulation.database import ScriptFault
from loadtest.simulation.redis import Fault, LuaExecutor
from statestore.executor import Reply, Script, ScriptCall
from statestore.ports import StoreUnavailable

TIME_US = 1_763_888_000_123_456


@pytest.fixture
def executor() -> LuaExecutor:
    return LuaExecutor(lambda: TIME_US)


def call(source: str, *args: bytes | str | int, keys: tuple[str, ...] = ("{f}a",)) -> ScriptCall:
    return ScriptCall(Script("test", source), keys, args)


def run(
    executor: LuaExecutor, source: str, *args: bytes | str | int, keys: tuple[str, ...] = ("{f}a",)
) -> Reply:
    return executor.run_now(call(source, *args, keys=keys))


@pytest.mark.parametrize(
    ("source", "reply"),
    [
        ("return 3.99", 3),
        ("return -3.99", -3),
        ("return {1, 'two', {3}, nil, 5}", [1, b"two", [3]]),
        ("return true", 1),
        ("return false", None),
        ("return nil", None),
        ("return {false, 1}", [None, 1]),
        ("return '\\0\\255'", b"\x00\xff"),
        ("return {ok = 'FINE'}", b"FINE"),
        ("return redis.call('TIME')", [b"1763888000", b"123456"]),
        ("return redis.call('HGET', KEYS[1], 'x') == false", 1),
        ("return redis.call('SET', KEYS[1], 'x').ok", b"OK"),
        ("return string.format('%.0f', 1763888000123456)", b"1763888000123456"),
        ("redis.call('SET', KEYS[1], 1763888000123457); return redis.call('GET', KEYS[1])",
         b"1763888000123457"),
        ("redis.call('SET', KEYS[1], 0.5); return redis.call('GET', KEYS[1])", b"0.5"),
    ],
)  # fmt: skip
def test_values_convert_as_in_redis(executor: LuaExecutor, source: str, reply: Reply) -> None:
    assert run(executor, source) == reply


def test_arguments_are_binary_safe(executor: LuaExecutor) -> None:
    every_byte = bytes(range(256))
    assert run(executor, "return {KEYS[1], #ARGV[1], ARGV[1], ARGV[2]}", every_byte, 7) == [
        b"{f}a",
        256,
        every_byte,
        b"7",
    ]


def test_strings(executor: LuaExecutor) -> None:
    source = """
    local k = KEYS[1]
    local lengths = {redis.call('STRLEN', k), redis.call('APPEND', k, 'hello')}
    return {lengths, redis.call('GETRANGE', k, 1, 2), redis.call('GETRANGE', k, -2, -1),
            redis.call('GETRANGE', k, 4, 99), redis.call('GETRANGE', k, 9, 12),
            redis.call('EXISTS', k), redis.call('DEL', k), redis.call('EXISTS', k)}
    """
    assert run(executor, source) == [[0, 5], b"el", b"lo", b"o", b"", 1, 1, 0]


def test_hashes(executor: LuaExecutor) -> None:
    source = """
    local k = KEYS[1]
    return {redis.call('HSET', k, 'a', 1, 'b', 2), redis.call('HSET', k, 'b', 3),
            redis.call('HMGET', k, 'a', 'x', 'b'), redis.call('HINCRBY', k, 'a', 41),
            redis.call('HGETALL', k), redis.call('HDEL', k, 'a', 'b', 'x'),
            redis.call('EXISTS', k)}
    """
    assert run(executor, source) == [
        2, 0, [b"1", None, b"3"], 42, [b"a", b"42", b"b", b"3"], 2, 0,
    ]  # fmt: skip


def test_sorted_sets(executor: LuaExecutor) -> None:
    source = """
    local k = KEYS[1]
    for member, score in pairs({a = 3, b = 1, c = 2, d = 2}) do
      redis.call('ZADD', k, score, member)
    end
    return {redis.call('ZADD', k, 9, 'a'), redis.call('ZSCORE', k, 'a'),
            redis.call('ZRANGEBYSCORE', k, '-inf', 2, 'WITHSCORES', 'LIMIT', 1, 2),
            redis.call('ZREVRANGEBYSCORE', k, '(9', '-inf', 'LIMIT', 0, 2),
            redis.call('ZREVRANGE', k, 0, 0, 'WITHSCORES'), redis.call('ZREM', k, 'a'),
            redis.call('ZSCORE', k, 'a'), redis.call('ZCARD', k)}
    """
    assert run(executor, source) == [
        0, b"9", [b"c", b"2", b"d", b"2"], [b"d", b"c"], [b"a", b"9"], 1, None, 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "keys", "complaint"),
    [
        ("return redis.call('GET', '{f}b')", ("{f}a",), "not declared"),
        ("return 1", ("{f}a", "{g}a"), "several slots"),
        ("return redis.call('KEYS', '*')", ("{f}a",), "not among those"),
        ("return redis.call('SET', KEYS[1], nil)", ("{f}a",), "strings or numbers"),
        ("redis.call('SET', KEYS[1], 'x'); redis.call('HGET', KEYS[1], 'x')", ("{f}a",), "WRONG"),
        ("leaked = 1", ("{f}a",), "writes the global leaked"),
        ("return os.time()", ("{f}a",), "unknown global os"),
        ("return {err = 'no'}", ("{f}a",), "error reply"),
        ("return nil + 1", ("{f}a",), "arithmetic"),
        ("this is not Lua", ("{f}a",), "does not compile"),
    ],
)
def test_what_a_server_or_cluster_refuses_is_raised(
    executor: LuaExecutor, source: str, keys: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ScriptFault, match=complaint):
        run(executor, source, keys=keys)


@pytest.mark.anyio
async def test_a_lost_request_is_not_applied_and_a_lost_reply_is() -> None:
    faults = iter([Fault.REQUEST_LOST, Fault.REPLY_LOST, Fault.NONE])
    waited: list[float] = []

    async def give_up(timeout_s: float) -> None:
        waited.append(timeout_s)

    executor = LuaExecutor(lambda: TIME_US, fault=lambda call: next(faults), give_up=give_up)
    appends = [call("return redis.call('APPEND', KEYS[1], ARGV[1])", text) for text in "abc"]
    lost, unheard, answered = await executor.execute(appends, timeout_s=2.0)
    assert isinstance(lost, StoreUnavailable)
    assert isinstance(unheard, StoreUnavailable)
    assert answered == 2
    assert run(executor, "return redis.call('GET', KEYS[1])") == b"bc"
    assert waited == [2.0]


def test_restore_loses_later_writes(executor: LuaExecutor) -> None:
    write = "redis.call('HSET', KEYS[1], ARGV[1], 1); return redis.call('HGETALL', KEYS[1])"
    run(executor, write, "early")
    before = executor.snapshot()
    run(executor, write, "late")
    executor.restore(before)
    executor.restore(before)
    assert run(executor, "return redis.call('HGETALL', KEYS[1])") == [b"early", b"1"]
