"""Faults of processes: workers and gateways that are killed, or stopped and woken as zombies.

A stopped process wakes only after it was replaced. What it wrote, or what the proxy held for it,
then arrives late and must change nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from gateway.core.errors import MigrationRefused, Unavailable
from tests.faults.agents import Door
from tests.faults.breakpoints import Breakpoint, Way
from tests.faults.fleet import Node
from tests.faults.proof import Unproven, until
from tests.faults.rounds import (
    LONG_PROMPT,
    PHASE_S,
    Reached,
    Round,
    Scenario,
    migrate,
)

Phase = Callable[[Round], Awaitable[Reached]]
LATE_ANSWERS = {
    "append": {"fenced"},
    "take": {"lost", "refused"},
    "place": {"lost", "refused"},
    "switch_migration": {"lost", "refused", "mismatch"},
    "open": {"written"},  # the retry has made it: this one finds it
}
"""What the store may say to a write that comes after its writer was replaced."""


# -- phases of workers -------------------------------------------------------------------------


async def prefill(round_: Round) -> Reached:
    """The turn is begun, its prompt of thousands of tokens is being computed."""
    point = Breakpoint(
        Way.DOWN,
        lambda s: s.script == "begin" and s.session_id == round_.focus.session_id,
        hold=False,
    )
    round_.proxy.arm(round_.links("redis", round_.fleet.workers), point)
    turn = round_.start_focus(prompt_chars=LONG_PROMPT)
    sighting = await round_.reach(point)
    if round_.appends(sighting.link, turn):
        raise Unproven("the prefill was over already")
    return Reached(node_of(round_, sighting.link))


async def decode(round_: Round, tokens: int = 60) -> Reached:
    """Tokens have been journalled, more follow."""
    point = Breakpoint(Way.DOWN, round_.is_append(False, nth=10), hold=False)
    round_.proxy.arm(round_.links("redis", round_.fleet.workers), point)
    turn = round_.start_focus(tokens=tokens)
    victim = node_of(round_, (await round_.reach(point)).link)
    if turn.ended:
        raise Unproven("the turn was over already")
    return Reached(victim)


async def long_decode(round_: Round) -> Reached:
    """For an engine whose tokens come fast."""
    return await decode(round_, tokens=300)


async def group_commit(round_: Round) -> Reached:
    return await _journalling(round_, commit=False)


async def commit(round_: Round) -> Reached:
    return await _journalling(round_, commit=True)


async def _journalling(round_: Round, *, commit: bool) -> Reached:
    """An append is under way: not applied yet and lost, applied and not acknowledged, or on its
    way until somebody else owns the session."""
    variant = round_.index % 3
    way = Way.DOWN if variant == 1 else Way.UP
    point = Breakpoint(way, round_.is_append(commit, nth=1 if commit else 8))
    round_.proxy.arm(round_.links("redis", round_.fleet.workers), point)
    round_.start_focus(tokens=30)
    sighting = await round_.reach(point)
    return Reached(node_of(round_, sighting.link), point, late=variant == 2, drop=variant == 0)


async def kv_export(round_: Round) -> Reached:
    return (await transfer(round_))[0]


async def kv_import(round_: Round) -> Reached:
    source, target = await transfer(round_)
    return Reached(target.victim, source.point)


async def moved(round_: Round, door: Door, target: Node, point: Breakpoint) -> None:
    """Moves the focus session; again while that is refused, for a replica that stood still for a
    moment takes none."""
    with anyio.move_on_after(PHASE_S):
        while True:
            result = await migrate(door, round_.focus, target)
            round_.prove(f"the move: {' '.join(str(result).split())}")
            refused = isinstance(result, MigrationRefused | Unavailable)
            if point.hit.is_set() or not refused:
                return
            await anyio.sleep(0.2)


async def transfer(round_: Round) -> tuple[Reached, Reached]:
    """(source, target) with a page half across; in every other round the session's turn runs."""
    source = await round_.owner(round_.focus)
    target = round_.draw.choice([n for n in round_.fleet.workers if n is not source])
    if round_.index % 2:
        running = anyio.Event()
        round_.start_focus(tokens=120, on_token=lambda _: running.set())
        with anyio.fail_after(30.0):
            await running.wait()
    mark = 20 + 256 * round_.draw.randrange(20, 100) + 100
    point = Breakpoint(Way.DOWN, lambda s: s.offset == mark, at_byte=mark)
    link = round_.proxy.links[f"kv:{source.name}"]
    link.arm(point)

    round_.tasks.start_soon(moved, round_, round_.agents[1].door, target, point)
    await round_.reach(point)
    received = sum(connection.received[Way.DOWN] for connection in link.connections)
    whole = 20 + LONG_PROMPT // 16 * 256
    if received >= whole:
        raise Unproven(f"{source.name} had sent all its pages")
    round_.prove(
        f"{mark} bytes are at {target.name}, {source.name} has sent {received} of {whole}+"
    )
    return Reached(source, point), Reached(target, point)


# -- phases of gateways ------------------------------------------------------------------------


async def gw_open(round_: Round) -> Reached:
    """A session is being opened, or given its first owner: before and after it is written."""
    gateway = focus_gateway(round_)
    script, way = [
        ("open", Way.UP), ("open", Way.DOWN), ("place", Way.UP), ("place", Way.DOWN),
    ][round_.index % 4]  # fmt: skip
    known = {agent.session_id for agent in round_.agents}
    point = Breakpoint(way, lambda s: s.script == script and s.session_id not in known)
    round_.proxy.links[f"redis:{gateway.name}"].arm(point)

    async def open_and_run() -> None:
        await round_.focus.open()
        round_.start_focus(tokens=30)

    round_.tasks.start_soon(open_and_run)
    await round_.reach(point)
    return Reached(gateway, point, late=way is Way.UP and round_.index % 8 >= 4)


async def gw_relay(round_: Round) -> Reached:
    """The gateway is passing a turn's tokens on."""
    gateway = focus_gateway(round_)
    some = anyio.Event()
    turn = round_.start_focus(
        tokens=100, on_token=lambda heard: some.set() if len(heard.tokens) > 10 else None
    )
    with anyio.fail_after(30.0):
        await some.wait()
    if turn.ended or turn.streams > 1 or round_.focus.door.name != gateway.name:
        raise Unproven("the turn was not being relayed any more")
    round_.prove(f"phase reached: {len(turn.tokens)} tokens came through {gateway.name}")
    return Reached(gateway)


async def gw_failover(round_: Round) -> Reached:
    """The gateway is taking a session whose owner was killed: before and after it is written."""
    gateway = focus_gateway(round_)
    way = Way.UP if round_.index % 2 else Way.DOWN
    session_id = round_.focus.session_id
    point = Breakpoint(way, lambda s: s.script == "take" and s.session_id == session_id)
    round_.proxy.links[f"redis:{gateway.name}"].arm(point)
    lost = (await decode(round_)).victim
    lost.process.kill()
    await lost.process.ended()
    round_.prove(f"{lost.name} killed")
    await round_.reach(point)
    round_.tasks.start_soon(round_.restart, lost)
    return Reached(gateway, point, late=way is Way.UP and round_.index % 4 == 3)


async def gw_migration(round_: Round) -> Reached:
    """The gateway is moving a session, idle or with its turn running: after the side record, in
    mid-copy, before and after the switch."""
    gateway = round_.draw.choice(round_.fleet.gateways)
    source = await round_.owner(round_.focus)
    target = round_.draw.choice([n for n in round_.fleet.workers if n is not source])
    door = next(d for d in round_.agents[1].doors if d.name == gateway.name)
    if round_.index // 4 % 2:
        running = anyio.Event()
        round_.start_focus(tokens=120, on_token=lambda _: running.set())
        with anyio.fail_after(30.0):
            await running.wait()
    step = round_.index % 4
    if step == 1:
        mark = 20 + 256 * round_.draw.randrange(20, 100) + 100
        point = Breakpoint(Way.DOWN, lambda s: s.offset == mark, at_byte=mark)
        round_.proxy.links[f"kv:{source.name}"].arm(point)
    else:
        script = "begin_migration" if step == 0 else "switch_migration"
        way = Way.UP if step == 2 else Way.DOWN
        point = Breakpoint(way, lambda s: s.script == script)
        round_.proxy.links[f"redis:{gateway.name}"].arm(point)

    round_.tasks.start_soon(moved, round_, door, target, point)
    await round_.reach(point)
    return Reached(gateway, point, late=step == 2)


# -- faults ------------------------------------------------------------------------------------


def killed(phase: Phase) -> Scenario:
    """SIGKILL in this phase; a new process of the same name comes at once, or when all is over."""

    async def scenario(round_: Round) -> None:
        reached = await phase(round_)
        before = await _ownership_if_any(round_)
        victim = reached.victim
        victim.process.kill()
        await victim.process.ended()
        round_.prove(f"{victim.name} killed (SIGKILL)")
        at_once = round_.draw.random() < 0.5
        if at_once:
            await round_.restart(victim)
        if reached.late:
            await overtaken(round_, before, victim)
        reached.let_go()
        if reached.late:
            await _refused(round_, reached)
        await focus_ends(round_)
        if not at_once:
            await round_.restart(victim)

    return scenario


def killed_in_mid_turn(phase: Phase) -> Scenario:
    """The same, where the turn must go on on another process: its end did not come before."""

    async def scenario(round_: Round) -> None:
        await killed(phase)(round_)
        turn = round_.focus_turn
        if turn is None or not turn.moves:
            raise Unproven("the turn ended where it began")
        round_.prove(f"the turn went on elsewhere, by way of {', '.join(turn.replicas)}")

    return scenario


def frozen(phase: Phase) -> Scenario:
    """SIGSTOP in this phase, SIGCONT when the victim has been replaced; in some rounds by a new
    process of its own name."""

    async def scenario(round_: Round) -> None:
        reached = await phase(round_)
        before = await _ownership_if_any(round_)
        victim = reached.victim
        old = victim.process
        old.stop()
        round_.prove(f"{victim.name} stopped (SIGSTOP)")
        if not reached.late:
            reached.let_go()
        namesake = victim.role == "worker" and round_.index % 5 == 4
        if namesake:
            round_.fleet.move(victim)
            await round_.restart(victim)
        await overtaken(round_, before, victim)
        old.wake()
        round_.prove(f"{victim.name} woken (SIGCONT)")
        reached.let_go()
        if reached.late:
            await _refused(round_, reached)
        if namesake:
            old.may_end_with(1)
            code = await old.ended()
            round_.prove(f"the replaced process ended with {code}")
            if code != 1:
                raise Unproven(f"a replaced worker ended with {code}, not 1")
        await focus_ends(round_)

    return scenario


async def _ownership_if_any(round_: Round) -> tuple[bytes, bytes, bytes]:
    if not round_.focus.session_id:
        return b"", b"", b""
    return await round_.ownership(round_.focus)


async def overtaken(round_: Round, before: tuple[bytes, bytes, bytes], victim: Node) -> None:
    """Until the world has gone on without the victim: for the owner of the session another owner,
    for others the end of the turn. An idle session goes on with a turn."""
    if round_.focus_turn is None and round_.focus.session_id:
        round_.start_focus()
    if before[1] == victim.name.encode():
        await round_.replaced(before)
    else:
        await focus_ends(round_)
        round_.prove("the turn has ended without it")


async def _refused(round_: Round, reached: Reached) -> None:
    """The late write has arrived, and changed nothing."""
    assert reached.point is not None
    assert reached.point.sighting is not None
    sent = reached.point.sighting
    link = round_.proxy.links[sent.link]
    outcomes: list[str] = []

    async def answered() -> bool:
        outcomes[:] = [
            s.outcome
            for s in link.seen
            if s.way is Way.DOWN
            and s.at > sent.at
            and (s.script, s.args) == (sent.script, sent.args)
        ]
        return bool(outcomes)

    await until(answered, f"no answer to the late {sent}")
    round_.prove(f"late: {sent} answered {outcomes[0]!r}")
    if outcomes[0] not in LATE_ANSWERS[sent.script] and not outcomes[0].startswith("NOSCRIPT"):
        round_.focus.violations.append(f"I1: a late {sent.script} was answered {outcomes[0]!r}")


async def focus_ends(round_: Round) -> None:
    """Until the focus session's turn has ended; one is started if there was none."""
    with anyio.fail_after(75.0):
        while round_.focus_turn is None:  # it is being opened, or was only to be moved
            if round_.focus.session_id:
                round_.start_focus()
                break
            await anyio.sleep(0.02)
        await round_.focus_done.wait()


def node_of(round_: Round, link: str) -> Node:
    """Whose link this is."""
    return round_.fleet.named(link.partition(":")[2])


def focus_gateway(round_: Round) -> Node:
    """The gateway that the focus agent uses."""
    return round_.fleet.named(round_.focus.door.name)


WORKER_PHASES: dict[str, Phase] = {
    "prefill": prefill,
    "decode": decode,
    "kv-export": kv_export,
    "kv-import": kv_import,
    "group-commit": group_commit,
    "commit": commit,
}
GATEWAY_PHASES: dict[str, Phase] = {
    "open": gw_open,
    "relay": gw_relay,
    "failover": gw_failover,
    "migration": gw_migration,
}
