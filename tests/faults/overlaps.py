"""Two faults at once: the second strikes while the system still answers the first.

Each scenario shows from the wire that the first fault was felt and not over when the second came.
"""

from __future__ import annotations

import anyio

from statestore import keys
from tests.faults.agents import Heard
from tests.faults.breakpoints import Breakpoint, Sighting, Verdict, Way
from tests.faults.fleet import Node
from tests.faults.processes import decode, focus_ends, focus_gateway, overtaken, transfer
from tests.faults.proof import Unproven, until
from tests.faults.rounds import Round
from tests.faults.servers import SentinelStore
from tests.faults.stores import heard_tokens, kill_server, refuses, single


async def redis_restart_and_worker_kill(round_: Round) -> None:
    """The owner dies while Redis is away, or just before: whoever wants to take its session finds
    no store to write that to, until Redis is back with its file."""
    server = single(round_).server
    owner = (await decode(round_)).victim
    if round_.index % 2:
        await kill_server(round_, server)
        await _kill(round_, owner)
    else:
        await _kill(round_, owner)
        await kill_server(round_, server)
    await _in_vain(round_, f"redis:{focus_gateway(round_).name}")
    _still_runs(round_)
    await anyio.sleep(round_.draw.choice([0.0, 0.5, 2.5]))
    await server.start()
    round_.prove(f"restarted as {server.process.pid} with its append-only file")
    await _taken(round_, since=0.0, refused=False)
    await round_.restart(owner)
    await focus_ends(round_)


async def memory_limit_and_worker_kill(round_: Round) -> None:
    """The owner dies while Redis refuses every write: nobody can take the session until there is
    memory again."""
    await heard_tokens(round_, 10)
    owner = await round_.owner(round_.focus)
    await round_.fleet.raw.config_set("maxmemory", 1 << 20)
    try:
        await refuses(round_, "OOM")
        killed_at = anyio.current_time()
        await _kill(round_, owner)
        await _taken(round_, since=killed_at, refused=True)
        _still_runs(round_)
        await anyio.sleep(round_.draw.uniform(0.0, 1.5))
    finally:
        await round_.fleet.raw.config_set("maxmemory", 0)
    round_.prove("there is memory again")
    await focus_ends(round_)
    await round_.restart(owner)


async def worker_kill_twice(round_: Round) -> None:
    """Whoever takes the turn up from a killed owner is killed as it does: before or after the
    store knows. A third goes on."""
    first = (await decode(round_)).victim
    others = [node for node in round_.fleet.workers if node is not first]
    way = Way.UP if round_.index % 2 else Way.DOWN
    session_id = round_.focus.session_id
    point = Breakpoint(way, lambda s: s.script == "resume" and s.session_id == session_id)
    round_.proxy.arm(round_.links("redis", others), point)
    await _kill(round_, first)
    second = round_.fleet.named((await round_.reach(point)).link.partition(":")[2])
    await _kill(round_, second)
    _still_runs(round_)
    point.decide(Verdict.DROP if way is Way.UP else Verdict.PASS)
    await focus_ends(round_)
    _, third, _ = await round_.ownership(round_.focus)
    if third.decode() in (first.name, second.name):
        raise Unproven(f"{third.decode()} was killed and owns the session")
    round_.prove(f"{third.decode()} has ended the turn")
    await round_.restart(first)
    await round_.restart(second)


async def worker_stop_and_gateway_kill(round_: Round) -> None:
    """The owner hangs, and the gateway that would notice dies before its lease is over: another
    gateway takes the session, and the owner wakes up replaced."""
    await heard_tokens(round_, 10)
    owner, gateway = await round_.owner(round_.focus), focus_gateway(round_)
    before = await round_.ownership(round_.focus)
    stopped_at = anyio.current_time()
    owner.process.stop()
    round_.prove(f"{owner.name} stopped (SIGSTOP)")
    await anyio.sleep(round_.draw.uniform(0.0, 1.0))
    await _kill(round_, gateway)
    if [s for s in _takes(round_) if s.at > stopped_at]:
        raise Unproven("the session was taken before the gateway died")
    _still_runs(round_)
    await round_.replaced(before)
    taken = await _taken(round_, since=stopped_at, refused=False)
    if taken.link == f"redis:{gateway.name}":
        raise Unproven(f"{gateway.name} is dead and took the session")
    owner.process.wake()
    round_.prove(f"{owner.name} woken (SIGCONT)")
    await focus_ends(round_)
    await round_.restart(gateway)


async def redis_cut_and_gateway_kill(round_: Round) -> None:
    """The owner cannot reach Redis, so that it holds tokens back, and the gateway that relays them
    dies: the client comes back through another one."""
    turn = await heard_tokens(round_, 10)
    owner, gateway = await round_.owner(round_.focus), focus_gateway(round_)
    link = round_.proxy.links[f"redis:{owner.name}"]
    link.cut()
    await _in_vain(round_, link.name)
    killed_at = anyio.current_time()
    await _kill(round_, gateway)
    _still_runs(round_)
    others = [f"redis:{node.name}" for node in round_.fleet.gateways if node is not gateway]

    async def comes_back() -> bool:
        asked = round_.proxy.sightings(session_id=turn.session_id)
        return any(s.link in others and s.at > killed_at for s in asked)

    await until(comes_back, "the client did not come back")
    round_.prove("the client asks another gateway")
    await anyio.sleep(round_.draw.uniform(0.0, 2.0))
    await _all_journalled(round_, turn)
    link.heal()
    round_.prove(f"{link.name} healed")
    await focus_ends(round_)
    await round_.restart(gateway)


async def promotion_and_export_stop(round_: Round) -> None:
    """The source of a move stops with a page half across, and Redis's replica is promoted while
    it sleeps. What it had written and the replica had not got yet, it cannot write again in time:
    its sessions' clients may be told of a loss."""
    store = round_.fleet.store
    assert isinstance(store, SentinelStore)
    source = (await transfer(round_))[0]
    before = await round_.ownership(round_.focus)
    await round_.may_lose_what_it_owns(source.victim)
    source.victim.process.stop()
    round_.prove(f"{source.victim.name} stopped (SIGSTOP)")
    await kill_server(round_, store.primary)
    await until(store.promoted, "Sentinel promoted nobody")
    round_.prove(f"{store.replica.name} promoted, the page is still half across")
    await store.swap()
    source.let_go()
    await overtaken(round_, before, source.victim)
    source.victim.process.wake()
    round_.prove(f"{source.victim.name} woken (SIGCONT)")
    await focus_ends(round_)
    await store.in_sync()


async def _kill(round_: Round, node: Node) -> None:
    node.process.kill()
    await node.process.ended()
    round_.prove(f"{node.name} killed (SIGKILL)")


async def _in_vain(round_: Round, link: str) -> None:
    """Until somebody has tried to connect over this link, and was not let."""
    path = round_.proxy.links[link]
    before = path.refused

    async def tried() -> bool:
        return path.refused > before

    await until(tried, f"nobody tried to connect over {link}")
    round_.prove(f"{link}: connections are tried for in vain")


async def _all_journalled(round_: Round, turn: Heard) -> None:
    """I2: whatever its owner could not write, the client does not have."""
    assert turn.start is not None
    has = turn.start.length + len(turn.tokens)
    stored = await round_.fleet.raw.strlen(keys.ledger_key(turn.session_id)) // 4
    if has > stored:
        turn.violations.append(f"I2: the client has {has} tokens, the ledger {stored}")
    round_.prove(f"the client has {has} tokens, the ledger {stored}")


def _still_runs(round_: Round) -> None:
    if round_.focus_turn is None or round_.focus_turn.ended:
        raise Unproven("the turn was over before the second fault")


def _takes(round_: Round) -> list[Sighting]:
    """Answers to gateways that wanted to take the focus session from its owner."""
    session_id = round_.focus.session_id
    return [
        s for s in round_.proxy.sightings(script="take", session_id=session_id) if s.way is Way.DOWN
    ]


async def _taken(round_: Round, *, since: float, refused: bool) -> Sighting:
    """Until a gateway was allowed to take the session, or the server itself refused that."""
    found: list[Sighting] = []

    async def seen() -> bool:
        found[:] = [
            s
            for s in _takes(round_)
            if s.at > since and s.outcome.startswith("OOM" if refused else "written")
        ]
        return bool(found)

    await until(seen, "no such answer to a gateway that takes the session")
    round_.prove(f"{found[0]}")
    return found[0]
