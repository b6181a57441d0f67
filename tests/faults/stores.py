"""Faults of the store: restarts, lost writes, promotion, moving slots, no disk, no memory."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from typing import Any

import anyio
from redis.exceptions import RedisError

from statestore import keys
from tests.faults.agents import Heard
from tests.faults.breakpoints import Breakpoint, Verdict, Way
from tests.faults.proof import Unproven, until
from tests.faults.rounds import Round
from tests.faults.servers import (
    ClusterStore,
    RedisServer,
    SentinelStore,
    SingleStore,
    client_of,
    reply_bytes,
)

# -- one server --------------------------------------------------------------------------------


async def heard_tokens(round_: Round, count: int, tokens: int = 100) -> Heard:
    """The focus turn runs and its client has heard some of it."""
    some = anyio.Event()
    turn = round_.start_focus(
        tokens=tokens, on_token=lambda heard: some.set() if len(heard.tokens) >= count else None
    )
    with anyio.fail_after(30.0):
        await some.wait()
    if turn.ended:
        raise Unproven("the turn was over already")
    round_.prove(f"phase reached: {len(turn.tokens)} tokens heard, the turn runs")
    return turn


async def hear_more(turn: Heard, count: int) -> None:
    """Until the client has heard so many more tokens: every one is acknowledged by the store."""
    goal = len(turn.tokens) + count

    async def enough() -> bool:
        return len(turn.tokens) >= goal or turn.ended

    await until(enough, f"no {count} further tokens")


async def restart(round_: Round) -> None:
    """SIGKILL with an append in flight (before or after it was applied), or between appends; the
    server comes back with its file."""
    server = single(round_).server
    variant = round_.index % 4
    point = None
    if variant < 3:
        way = Way.UP if variant == 0 else Way.DOWN
        commit = variant == 2
        point = Breakpoint(way, round_.is_append(commit, nth=1 if commit else 8))
        round_.proxy.arm(round_.links("redis", round_.fleet.workers), point)
        round_.start_focus(tokens=30 if commit else 60)
        await round_.reach(point)
    else:
        await heard_tokens(round_, 10)
    await kill_server(round_, server)
    if point is not None:
        point.decide(Verdict.DROP)
    await anyio.sleep(round_.draw.choice([0.0, 0.3, 1.5, 3.0]))
    await server.start()
    round_.prove(f"restarted as {server.process.pid} with its append-only file")
    await round_.focus_done.wait()


async def power_cut(round_: Round) -> None:
    """With appendfsync everysec a power cut loses what was acknowledged within the last second:
    the server is killed, and the end of its file is cut off, in mid-record if it falls so. In every
    third round the worker that could repair it dies too."""
    server = single(round_).server
    turn = await heard_tokens(round_, 10)
    kept = server.aof().stat().st_size
    before = len(turn.tokens)
    await hear_more(turn, 15)
    heard = len(turn.tokens)
    unrepaired = round_.index % 3 == 2
    owner = await round_.kill_owner() if unrepaired else None
    await kill_server(round_, server)
    size = server.aof().stat().st_size
    os.truncate(server.aof(), kept)
    if heard <= before or size <= kept or turn.ended:
        raise Unproven("nothing acknowledged was lost")
    round_.prove(f"{size - kept} bytes lost, {heard - before} heard tokens among them")
    await server.start()
    if owner is not None:
        await round_.restart(owner)
    await round_.focus_done.wait()


async def kill_server(round_: Round, server: RedisServer) -> None:
    """SIGKILL."""
    server.process.kill()
    await server.process.ended()
    round_.prove(f"{server.name} killed (SIGKILL), it was {server.process.pid}")


async def disk_full(round_: Round) -> None:
    """No byte more can be written to the append-only file (a limit of the process on file sizes:
    the server sees EFBIG where a full disk gives ENOSPC). With everysec it refuses writes until
    there is room; with always it exits."""
    server = single(round_).server
    await heard_tokens(round_, 10)
    size = server.aof().stat().st_size
    pid = server.process.pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    if "always" in server.options:
        server.process.may_end_with(1)
        code = await server.process.ended()
        round_.prove(f"the server cannot write past {size} bytes and exited with {code}")
        await anyio.sleep(round_.draw.uniform(0.1, 2.0))
        await server.start()
    else:
        await refuses(round_, "MISCONF")
        await anyio.sleep(round_.draw.uniform(0.1, 2.0))
        infinity = resource.RLIM_INFINITY
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (infinity, infinity))
    round_.prove("there is room again")
    await round_.focus_done.wait()


async def memory_full(round_: Round) -> None:
    """maxmemory below what is in use: every write is refused."""
    await heard_tokens(round_, 10)
    await round_.fleet.raw.config_set("maxmemory", 1 << 20)
    try:
        await refuses(round_, "OOM")
        await anyio.sleep(round_.draw.uniform(0.1, 2.0))
    finally:
        await round_.fleet.raw.config_set("maxmemory", 0)
    round_.prove("there is memory again")
    await round_.focus_done.wait()


async def refuses(round_: Round, error: str) -> None:
    """Until the server has refused writes with this error."""
    raw = round_.fleet.raw
    before = _count(await raw.info("errorstats"), error)

    async def refused() -> bool:
        return _count(await raw.info("errorstats"), error) > before + 1

    await until(refused, f"no write was refused with {error}")
    count = _count(await raw.info("errorstats"), error) - before
    round_.prove(f"the server refused {count} calls with {error}")


def _count(info: dict[str, Any], error: str) -> int:
    entry = info.get(f"errorstat_{error}", {"count": 0})
    return int(entry["count"] if isinstance(entry, dict) else str(entry).partition("=")[2])


def single(round_: Round) -> SingleStore:
    """The store, which is one server."""
    store = round_.fleet.store
    assert isinstance(store, SingleStore)
    return store


# -- Sentinel and Cluster ----------------------------------------------------------------------


async def promotion(round_: Round) -> None:
    """The replica is kept behind, the primary acknowledges, and dies; Sentinel promotes the
    replica, which never had those writes. In every third round the worker that could repair it
    dies too."""
    store = round_.fleet.store
    assert isinstance(store, SentinelStore)
    turn = await heard_tokens(round_, 10, tokens=150)
    link = round_.proxy.links[f"store:{store.primary.name[-1]}"]
    link.half_open([Way.DOWN], replication_only=True)
    await hear_more(turn, 20)
    name = keys.ledger_key(round_.focus.session_id)
    behind = client_of(store.replica.port)
    try:
        had = await store.raw.strlen(name) - await behind.strlen(name)
        if had <= 0 or turn.ended:
            raise Unproven("the replica was not behind")
        owner = await round_.kill_owner() if round_.index % 3 == 2 else None
        await kill_server(round_, store.primary)
        round_.prove(f"its replica has {had // 4} tokens of the session less")
        await until(store.promoted, "Sentinel promoted nobody")
    finally:
        await behind.aclose()
    round_.prove(f"{store.replica.name} promoted")
    link.heal()
    await store.swap()
    if owner is not None:
        await round_.restart(owner)
    await round_.focus_done.wait()
    await store.in_sync()


async def slot_move(round_: Round) -> None:
    """The focus session's slot moves to another node, key by key, while its turn runs."""
    store = round_.fleet.store
    assert isinstance(store, ClusterStore)
    turn = await heard_tokens(round_, 10, tokens=200)
    name = keys.session_key(round_.focus.session_id)
    slot = int(await store.nodes[0].execute_command("CLUSTER", "KEYSLOT", name))
    ids = [
        reply_bytes(await node.execute_command("CLUSTER", "MYID")).decode() for node in store.nodes
    ]
    source = await _node_of_slot(store, slot)
    target = round_.draw.choice([i for i in range(3) if i != source])
    before = await _redirections(store)

    async def set_slot(node: int, *what: object) -> None:
        await store.nodes[node].execute_command("CLUSTER", "SETSLOT", slot, *what)

    await set_slot(target, "IMPORTING", ids[source])
    await set_slot(source, "MIGRATING", ids[target])
    moved = 0
    while True:
        names = await store.nodes[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1)
        if not names:
            break
        port = store.servers[target].port
        await store.nodes[source].execute_command("MIGRATE", "127.0.0.1", port, names[0], 0, 5000)
        moved += 1
        if moved == 1:
            with suppress(Unproven):  # perhaps nobody asked for just that key yet
                await until(lambda: _more(store, before), "no redirection", 2.0)
    for node in (target, source, *range(3)):
        await set_slot(node, "NODE", ids[target])
    redirected = await _redirections(store) - before
    if not redirected or turn.ended:
        raise Unproven(f"{redirected} redirections while the turn ran")
    round_.prove(
        f"slot {slot} moved from node {source} to {target}: {moved} keys, {redirected} calls"
        " were answered ASK, TRYAGAIN or MOVED"
    )
    await round_.focus_done.wait()


async def _more(store: ClusterStore, than: int) -> bool:
    return await _redirections(store) > than


async def _redirections(store: ClusterStore) -> int:
    found = 0
    for node in store.nodes:
        info = await node.info("errorstats")
        found += sum(_count(info, error) for error in ("ASK", "TRYAGAIN", "MOVED"))
    return found


async def _node_of_slot(store: ClusterStore, slot: int) -> int:
    for index, node in enumerate(store.nodes):
        with suppress(RedisError):
            if await node.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot):
                return index
    raise Unproven(f"nobody has slot {slot}")
