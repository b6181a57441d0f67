"""Faults of the paths between processes, of clients, and of clocks."""

from __future__ import annotations

import signal
from datetime import datetime

import anyio

from statestore import keys
from tests.faults.agents import Door, Heard
from tests.faults.breakpoints import Way
from tests.faults.fleet import CLOCK_MARK, Node
from tests.faults.proof import Unproven, until
from tests.faults.proxy import PART_S, Connection, Link
from tests.faults.rounds import Round, Scenario
from tests.faults.stores import heard_tokens

DELAY_S = 0.15
BYTES_PER_S = 1500.0
HELD_SHARE = 0.25
"""Of the time a throttle must have held a connection back."""
LONG_S = 2.5
"""How long a path stays broken at most (half-open ones: longer than a lease)."""
CLOCK_JUMPS_S = (3600, -3600, 5, -5, 86_400 * 400)


def on_path(path: str, fault: str) -> Scenario:
    """Breaks ``path`` of the focus session's turn, while it runs, in this way; then mends it."""

    async def scenario(round_: Round) -> None:
        turn = await heard_tokens(round_, 10)
        link = await _link_of(round_, path)
        if not link.connections:
            raise Unproven(f"nobody is connected over {link.name}")
        started = anyio.current_time()
        before = dict(link.passed)
        broken = {c: {way: c.carried(way) for way in Way} for c in link.connections}
        match fault:
            case "delay":
                link.delay_s = DELAY_S
            case "throttle":
                link.bytes_per_s = BYTES_PER_S
            case "cut":
                link.cut()
            case "half-open":
                link.half_open([[Way.UP, Way.DOWN], [Way.UP], [Way.DOWN]][round_.index % 3])
        if turn.ended:
            raise Unproven("the turn was over already")
        round_.prove(f"{link.name}: {fault}")
        # Until it was felt for a while, or the turn has come to its end in spite of it.
        limit_s = round_.draw.uniform(0.5, 2 * LONG_S if fault == "half-open" else LONG_S)
        with anyio.move_on_after(limit_s):
            await round_.focus_done.wait()
        passed = {way: link.passed[way] - before[way] for way in Way}
        felt_s = anyio.current_time() - started
        proof = f"after {felt_s:.2f} s: {passed[Way.UP]} bytes up, {passed[Way.DOWN]} down"
        if fault == "throttle":
            proof += f", {_check_throttled(link, broken, felt_s):.0%} of the time at the limit"
        else:
            _check_met(link, fault, set(broken), passed)
        link.heal()
        round_.prove(f"{proof}; healed")
        await round_.focus_done.wait()

    return scenario


def _check_met(link: Link, fault: str, broken: set[Connection], passed: dict[Way, int]) -> None:
    """The log alone must show that traffic met the fault."""
    met = {
        "delay": bool(sum(passed.values())),
        "cut": link.resets > 0 and not broken & set(link.connections),
        "half-open": any(connection.swallowed for connection in link.connections)
        or not broken & set(link.connections),
    }[fault]
    if not met:
        raise Unproven(f"{link.name}: no traffic met the {fault}")


def _check_throttled(link: Link, before: dict[Connection, dict[Way, int]], felt_s: float) -> float:
    """No connection carried more than the rate that each has for itself, and one was held back by
    it for a good part of the time; the largest such part."""
    held = 0.0
    for connection in {*before, *link.connections}:
        for way in Way:
            carried = connection.carried(way) - before.get(connection, {}).get(way, 0)
            if carried > BYTES_PER_S * (felt_s + PART_S):
                raise Unproven(f"{link.name}: {carried} bytes passed in {felt_s:.2f} s")
            held = max(held, carried / BYTES_PER_S / felt_s)
    if held < HELD_SHARE:
        raise Unproven(f"{link.name}: the throttle held nothing back for long ({held:.0%})")
    return held


async def _link_of(round_: Round, path: str) -> Link:
    if path == "client-gateway":
        return round_.proxy.links[f"client:{round_.focus.door.name}"]
    kind = {"gateway-worker": "grpc", "worker-redis": "redis"}[path]
    return round_.proxy.links[f"{kind}:{(await round_.owner(round_.focus)).name}"]


# -- clients -----------------------------------------------------------------------------------


async def slow_client(round_: Round) -> None:
    """The client's link carries a few hundred bytes a second: the turn is committed long before
    the client has it, nobody else waits, and in the end the client has everything."""
    link = _own_link(round_)
    link.bytes_per_s = 400.0
    turn = await heard_tokens(round_, 3, tokens=80)
    await _committed(round_, turn)
    if turn.ended or len(turn.tokens) >= 80:
        raise Unproven("the client kept up")
    round_.prove(f"the turn is committed, its client has {len(turn.tokens)} tokens of 80")
    for done in round_.bystanders_done:
        await done.wait()
    worst = max(h.worst_gap_s for a in round_.agents if a is not round_.focus for h in a.turns)
    round_.prove(f"the worst gap of the others was {worst:.2f} s")
    link.heal()
    await round_.focus_done.wait()


async def vanished_client(round_: Round) -> None:
    """The client goes without a word (its connection is reset, or falls silent), and is back only
    when the turn has long been committed."""
    link = _own_link(round_)
    turn = await heard_tokens(round_, 10, tokens=80)
    if round_.index % 2:
        link.cut()
    else:
        link.half_open()
    heard = len(turn.tokens)
    await _committed(round_, turn)
    if turn.ended:
        raise Unproven("the client had not gone")
    how = "reset" if round_.index % 2 else "silent"
    round_.prove(f"{how} after {heard} tokens; the turn is committed without its client")
    link.heal()
    await round_.focus_done.wait()


def _own_link(round_: Round) -> Link:
    """Gives the focus agent a link of its own to each gateway; that of the one it uses."""
    for index, door in enumerate(round_.focus.doors):
        shared = round_.proxy.links[f"client:{door.name}"]
        own = round_.proxy.add(f"focus:{door.name}", ("127.0.0.1", 0), shared.target)
        own.window_bytes = 4096
        round_.focus.doors[index] = Door(door.name, own.endpoint)
        round_.tasks.start_soon(door.channel.close)
    # The others stay unreachable: the client is slow or gone, whatever it tries.
    link = round_.proxy.links[f"focus:{round_.focus.door.name}"]
    round_.focus.doors = round_.focus.doors[:1]
    return link


async def _committed(round_: Round, turn: Heard) -> None:
    name, status = keys.session_key(turn.session_id), f"t:{turn.turn_id}:status"

    async def committed() -> bool:
        return bool(await round_.fleet.raw.hget(name, status) == b"COMMITTED")

    await until(committed, "the turn is not committed")


# -- clocks ------------------------------------------------------------------------------------


async def clock_jump(round_: Round) -> None:
    """The wall clock of the worker that runs the turn jumps, and jumps back after a while (its
    monotonic clock goes on, as it does on a real host)."""
    await heard_tokens(round_, 10)
    owner = await round_.owner(round_.focus)
    jump_s = CLOCK_JUMPS_S[round_.index % len(CLOCK_JUMPS_S)]
    assert owner.clock is not None
    owner.clock.write_text(f"{jump_s:+d}")
    await _shows(round_, owner, jump_s)
    with anyio.move_on_after(round_.draw.uniform(0.5, 2.0)):
        await round_.focus_done.wait()
    owner.clock.write_text("+0")
    await _shows(round_, owner, 0)
    await round_.focus_done.wait()


async def _shows(round_: Round, node: Node, jump_s: int) -> None:
    """Until the process itself says what time it is, and it is this much off."""
    shown = 0.0

    async def jumped() -> bool:
        nonlocal shown
        node.process.signal(signal.SIGUSR1)
        await anyio.sleep(0.05)
        said = [line for line in node.process.log.read_text().splitlines() if CLOCK_MARK in line]
        shown = float(said[-1].split()[-1]) - datetime.now().timestamp() if said else 1e12
        return abs(shown - jump_s) < 2.0

    await until(jumped, f"{node.name}'s clock did not jump by {jump_s} s")
    round_.prove(f"{node.name} says that its clock is {shown:+.1f} s off")
