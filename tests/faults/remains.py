"""What is left when every session is closed: asked of the fleet, and looked for without asking it.

The fleet's own word is its load. Beside it stand what the kernel says of its processes, what the
store holds raw, and whether all pages of a worker can be used at once.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from statestore import keys
from tests.faults.agents import Agent, Heard, quietly
from tests.faults.engines import ENGINE
from tests.faults.fleet import Fleet, Node
from tests.faults.proof import until
from tests.faults.rounds import migrate
from tests.faults.servers import client_of
from tests.faults.verdict import ENDED, replicas

CLEAN_WITHIN_S = 20.0
MAX_DESCRIPTORS = 80
"""Of a process at rest: about 25 from its start, and a connection or two to each other process."""
MAX_THREADS = 40
PROBE_TOKENS = 32_300
"""Of a context; two of them leave a worker of the sim engine few pages."""
PROBE_OUTPUT = 200
PAGES_BEHIND = 16
"""A load is told twice a second, and each generation has taken up to four pages more than it
needs."""


async def what_is_left(fleet: Fleet) -> list[str]:
    """Everything that should not be there. The sessions of all agents are closed."""
    endpoints = {n.name: fleet.proxy.links[f"client:{n.name}"].endpoint for n in fleet.gateways}
    agents = [
        Agent(f"monitor-{i}", endpoints, random.Random(i)) for i in range(2 * len(fleet.workers))
    ]
    try:
        found = await by_its_word(fleet, agents[0])
        if not found and fleet.engine.knows_its_tokens:
            found += await every_page(fleet, agents)
            found += await by_its_word(fleet, agents[0])
    finally:
        for agent in agents:
            await agent.aclose()
    found += await in_the_store(fleet)
    return found + [what for node in fleet.nodes.values() for what in of_process(fleet, node)]


async def by_its_word(fleet: Fleet, monitor: Agent) -> list[str]:
    """By the load that the workers report: nothing runs, waits, or is pinned, pages are free."""
    found: list[str] = ["no replica is known"]
    with anyio.move_on_after(CLEAN_WITHIN_S):
        while found:
            seen = await quietly(replicas(monitor.door))
            if not isinstance(seen, dict):
                found = [f"the gateway does not say what it sees: {seen}"]
                continue
            found = [f"{n.name} is not there" for n in fleet.workers if n.name not in seen]
            for name, replica in seen.items():
                load = replica.load
                for what, count in (
                    ("turns run", load.running_turns),
                    ("turns wait", load.queued_turns),
                    ("sessions are resident", load.sessions),
                    ("pages are pinned", load.pinned_pages),
                    ("pages are held", replica.capacity_pages - load.free_pages),
                ):
                    if count:
                        found.append(f"{name}: {count} {what} after every session was closed")
            await anyio.sleep(0.2)
    return found


# -- pages -------------------------------------------------------------------------------------


async def every_page(fleet: Fleet, agents: list[Agent]) -> list[str]:
    """Two contexts that together need nearly all of its pages run at once on each worker: a page
    that anything still held would make one of them wait for the other. While they run, the worker
    reports as many pages as the store's ledgers need."""
    found: list[str] = []

    async def probe(worker: Node, pair: list[Agent]) -> None:
        found.extend(f"{worker.name}: {what}" for what in await _fill(fleet, worker, pair))

    async with anyio.create_task_group() as tasks:
        for index, worker in enumerate(fleet.workers):
            tasks.start_soon(probe, worker, agents[2 * index : 2 * index + 2])
    return found


async def _fill(fleet: Fleet, worker: Node, pair: list[Agent]) -> list[str]:
    for agent in pair:
        await agent.open()
        await agent.turn(tokens=2)
        seen = await fleet.raw.hget(keys.session_key(agent.session_id), "owner")
        if seen != worker.name.encode():
            await migrate(agent.door, agent, worker)
    turns = [agent.next_turn(tokens=PROBE_OUTPUT) for agent in pair]
    for agent, turn in zip(pair, turns, strict=True):
        # A token a letter, and nothing in common.
        turn.request.messages[0].content = f"{worker.name} {agent.name} ".ljust(PROBE_TOKENS, "x")
    found: list[str] = []
    waited: list[bool] = []
    """Whether the other had ended at a turn's first token: who only looks now and then may find
    that it has ended since."""

    def speaks(turn: Heard) -> None:
        if len(turn.arrivals) == 1:
            waited.append(any(other.ended for other in turns))

    async with anyio.create_task_group() as tasks:
        for agent, turn in zip(pair, turns, strict=True):
            turn.on_token = speaks
            tasks.start_soon(agent.run, turn)
        await until(partial(_all_speak, turns), "the probes do not say anything", 60.0)
        if any(waited) or not all(turn.tokens for turn in turns):
            found.append("of two contexts that fit its pages one waited for the other's end")
        else:
            await anyio.sleep(1.0)  # for a load that is told meanwhile
            found += await _compare_pages(fleet, worker, turns)
    for agent, turn in zip(pair, turns, strict=True):
        found += [f"while all pages were asked for: {what}" for what in turn.violations]
        if {*turn.replicas} != {worker.name}:
            found.append(f"the turn that was to fill it ran on {turn.replicas}")
        await agent.close()
    return found


async def _all_speak(turns: list[Heard]) -> bool:
    return all(turn.tokens or turn.ended for turn in turns)


async def _compare_pages(fleet: Fleet, worker: Node, turns: list[Heard]) -> list[str]:
    """What the ledgers need now, in pages, against what the worker has told the store."""
    load = json.loads(await fleet.raw.hget(keys.FLEET, f"load:{worker.name}"))
    needed = 0
    for turn in turns:
        stored = await fleet.raw.strlen(keys.ledger_key(turn.session_id)) // 4
        needed += -(-stored // ENGINE.page_size)
    held = ENGINE.capacity_pages - load["free_pages"]
    if any(turn.ended for turn in turns) or abs(held - needed) <= PAGES_BEHIND:
        return []
    return [f"it reports {held} pages in use, the ledgers of its turns need {needed}"]


# -- the store ---------------------------------------------------------------------------------


async def in_the_store(fleet: Fleet) -> list[str]:
    """Read raw: sessions are closed, without owner, move or running turn; a ledger is as long as
    its session says; no key is there whose kind is not known. What an index lists may be closed
    until its retention ends, but is there."""
    found: list[str] = []
    for server in fleet.store.primaries():
        client = client_of(server.port)
        try:
            async for name in client.scan_iter(count=500):
                found += [
                    f"{name.decode()}: {what}" for what in await _of_key(fleet.raw, client, name)
                ]
        finally:
            await client.aclose()
    return found


async def _of_key(store: Any, client: Any, name: bytes) -> list[str]:
    """``client``: of the server that has the key; ``store``: of all of them."""
    _, _, kind = name.decode().partition("sessile:")
    if kind.startswith("{"):
        family, _, kind = kind.partition("}:")
        match kind[:2]:
            case "s:":
                record = await client.hgetall(name)
                ledger = await client.strlen(f"sessile:{family}}}:l:{kind[2:]}")
                return of_session(record, ledger)
            case "l:":
                return (
                    []
                    if await client.exists(f"sessile:{family}}}:s:{kind[2:]}")
                    else ["no session"]
                )
        return [] if kind == "refs" else ["a key of no known kind"]
    if kind == "due" or kind.startswith(("replica-sessions:", "tenant-sessions:")):
        ids = [item.decode() for item in await client.zrange(name, 0, -1)]
        return [
            f"lists {session_id}, which is not there"
            for session_id in ids
            if not await store.exists(keys.session_key(session_id))
        ]
    known = ("fleet", "lease:sweeper", "tenant-salt:", "usage:", "usage-tenants")
    return [] if kind.startswith(known) else ["a key of no known kind"]


def of_session(record: dict[bytes, bytes], ledger_bytes: int) -> list[str]:
    """What is wrong with a session that was closed."""
    found = [
        f"it is closed and has {field.decode()} {record[field]!r}"
        for field in (b"owner", b"active", b"mig")
        if record.get(field)
    ]
    if record[b"state"] != b"CLOSED":
        found.append(f"it is {record[b'state'].decode()}")
    if ledger_bytes != 4 * int(record[b"length"]):
        found.append(f"its ledger has {ledger_bytes} bytes for {int(record[b'length'])} tokens")
    for field, value in record.items():
        if field[:2] == b"t:" and field[-7:] == b":status" and value not in ENDED:
            found.append(f"turn {field[2:-7].decode()} is {value.decode()}")
    return found


# -- processes ---------------------------------------------------------------------------------


def of_process(fleet: Fleet, node: Node) -> list[str]:
    """By the kernel: no children, no shared memory, no temporary file, no connection of a KV
    transfer, and no more descriptors and threads than a process at rest has."""
    proc = Path(f"/proc/{node.process.pid}")
    tasks = list((proc / "task").iterdir())
    targets = dict(_descriptors(proc))
    found = ["it has children" for task in tasks if (task / "children").read_text().split()]
    shared = [where for where in targets.values() if where.startswith(("/dev/shm", "/memfd:"))]
    shared += [line for line in (proc / "maps").read_text().splitlines() if "/dev/shm" in line]
    if node.clock is not None:
        shared = [where for where in shared if "faketime" not in where]  # the library's own
    found += [f"shared memory: {where}" for where in shared]
    files = [path for path in node.temporary.rglob("*") if not path.is_dir()]
    found += [f"a temporary file: {path.name}" for path in files]
    if len(targets) > MAX_DESCRIPTORS or len(tasks) > MAX_THREADS:
        found.append(f"{len(targets)} descriptors and {len(tasks)} threads at rest")
    ports = {worker.kv_port for worker in fleet.workers}
    for peer in _connections(proc, {*targets.values()}):
        if ports & {*peer}:
            found.append(f"a connection for KV is open, ports {peer}")
    return [f"{node.name}: {what}" for what in found]


def _descriptors(proc: Path) -> Iterator[tuple[str, str]]:
    for descriptor in (proc / "fd").iterdir():
        with suppress(OSError):
            yield descriptor.name, os.readlink(descriptor)


def _connections(proc: Path, targets: set[str]) -> Iterator[tuple[int, int]]:
    """(own port, other port) of its established TCP connections over IPv4."""
    for line in (proc / "net" / "tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "01" and f"socket:[{fields[9]}]" in targets:
            own, other = (int(address.partition(":")[2], 16) for address in fields[1:3])
            yield own, other
