"""Shows what is stored, heard and held."""

from __future__ import annotations

from loadtest.simulation.scenario.script import Command
from loadtest.simulation.scenario.stage import CommandTable, Stage, table_of
from loadtest.simulation.world import SimReplica


async def do_show(stage: Stage, c: Command) -> None:
    """Shows sessions, clients and replicas."""
    for name in c.words:
        if name in stage.seen.sessions:
            await _show_session(stage, name)
        elif name in stage.seen.clients:
            heard = stage.seen.clients[name].heard
            stage.seen.say(f"{name}: {len(heard.tokens)} tokens, {len(heard.text)} characters")
        else:
            _show_replica(stage, stage.world.replicas[name])


async def _show_session(stage: Stage, name: str) -> None:
    session_id, store = stage.seen.sessions[name], stage.world.store
    session = await store.get_session(session_id)
    if session is None:
        stage.seen.say(f"{name}: nothing is stored")
        return
    owner = session.owner
    where = "nobody's" if owner is None else f"{stage.seen.ref(owner.replica)}'s"
    epochs = stage.watch.epochs.get(session_id, [])
    epoch = 1 + epochs.index(session.epoch) if session.epoch in epochs else 0
    moving = f", moving to {session.migration.target.replica_id}" if session.migration else ""
    stage.seen.say(
        f"{name}: {session.state}, {where}, epoch {epoch}, {session.head.length} tokens,"
        f" turn {session.turn_index}{moving}"
    )
    for turn in await store.get_turns(session, 0, 1000):
        how = f" ({turn.result.reason})" if turn.result else ""
        why = f": {turn.result.error}" if turn.result and turn.result.error else ""
        stage.seen.say(
            f"  {turn.spec.turn_id}: {turn.status}{how}, attempt {turn.attempt},"
            f" output {turn.output_start.length}..{turn.output_end.length}{why}"
        )


def _show_replica(stage: Stage, replica: SimReplica) -> None:
    assert replica.ref is not None
    assert replica.app is not None
    views = [g.app.fleet.snapshot.state_of(replica.ref) for g in stage.world.live_gateways()]
    if replica.ended:
        stage.seen.say(
            f"{stage.seen.ref(replica.ref)}: ended, seen {'/'.join(dict.fromkeys(views))}"
        )
        return
    held = ", ".join(sorted(map(stage.seen.name, replica.app.session_ids()))) or "no session"
    pages = replica.engine.load().pinned_pages
    seen = "/".join(dict.fromkeys(views))
    stage.seen.say(f"{stage.seen.ref(replica.ref)}: {seen}, holds {held}, {pages} pages pinned")


COMMANDS: CommandTable = table_of(
    do_show,
)
