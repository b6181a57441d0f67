"""The Lua scripts: one file per operation in ``statestore/lua``, a shared prelude before each.

The scripts keep to plain Lua 5.1 and to few commands, so that an in-process interpreter with a
small command table can run the very same text (the simulation does). They use no library of
Redis but ``redis.call``, and these commands with these options only:

    TIME
    HGET  HSET (many pairs)  HMGET  HGETALL  HDEL (many fields)  HINCRBY
    GET  SET (no options)  APPEND  GETRANGE  STRLEN  DEL (many keys)  EXISTS
    ZADD key score member   ZREM key member   ZSCORE   ZCARD
    ZRANGEBYSCORE key min max WITHSCORES LIMIT offset count      (min/max: number, -inf, +inf)
    ZREVRANGEBYSCORE key max min WITHSCORES LIMIT offset count   (and "(number" for max)
    ZREVRANGE key 0 0 WITHSCORES

Arguments and values are byte strings; a missing hash field or string is ``false``; scores come
back as decimal strings without an exponent (they are integers below 2^53).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from statestore.executor import Script
from statestore.records import SCHEMA_VERSION

SESSION_FIELDS = (
    "id",
    "tenant",
    "model",
    "state",
    "epoch",
    "nonce",
    "owner",
    "owner_inc",
    "length",
    "digest",
    "turn_index",
    "active",
    "segments",
    "own_base",
    "preamble",
    "leading",
    "fingerprint",
    "labels",
    "parent",
    "mig",
    "mig_target",
    "mig_inc",
    "mig_until",
    "created",
    "updated",
    "prev",
    "prev_inc",
    "version",
    "turn_ended",
)
"""Fields of a session's hash as replies list them (scripts keep a few more for themselves)."""

TURN_FIELDS = (
    "id",
    "index",
    "input_digest",
    "body",
    "timeout",
    "deadline",
    "status",
    "attempt",
    "input_start",
    "start_len",
    "start_digest",
    "end_len",
    "end_digest",
    "reason",
    "text_end",
    "usage",
    "error",
    "replica",
    "replica_inc",
)
"""Fields of a turn, kept in its session's hash as ``t:<turn id>:<field>``."""

_LUA = Path(__file__).parent / "lua"


@cache
def load_script(name: str) -> Script:
    """The script ``lua/<name>.lua`` with the constants and the prelude before it."""
    return Script(name, _prelude() + (_LUA / f"{name}.lua").read_text(encoding="utf-8"))


def script_names() -> tuple[str, ...]:
    """All scripts there are, sorted."""
    return tuple(sorted(path.stem for path in _LUA.glob("*.lua") if path.stem != "prelude"))


@cache
def _prelude() -> str:
    constants = (
        f"local SCHEMA = {SCHEMA_VERSION}\n"
        f"local SESSION_FIELDS = {_lua_list(SESSION_FIELDS)}\n"
        f"local TURN_FIELDS = {_lua_list(TURN_FIELDS)}\n"
    )
    return constants + (_LUA / "prelude.lua").read_text(encoding="utf-8")


def _lua_list(names: tuple[str, ...]) -> str:
    return "{" + ", ".join(f"'{name}'" for name in names) + "}"
