"""Commands of sessions."""

from __future__ import annotations

from typing import Any

from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.directory import SessionDirectory
from gateway.app.migration import MoveOptions
from gateway.core.placement import Decision, PlacementRequest, place
from loadtest.simulation.clients.agents import TENANT
from loadtest.simulation.scenario.script import BadScript, Command
from loadtest.simulation.scenario.stage import CommandTable, Stage, table_of

MAX_NAMES_TRIED = 256


async def do_open(stage: Stage, c: Command) -> None:
    """Opens a session, if asked for on a certain replica."""
    (name,), tenant = c.words, c.options.get("tenant", TENANT)
    request = session_pb2.OpenSessionRequest(request_id=name)
    if "leading" in c.options:
        manual = "Read all of this. " * (int(c.options["leading"]) // 18)
        request.messages.add(role=pb.Message.ROLE_SYSTEM, content=manual)
    if "on" in c.options:
        request.request_id = await _placed_on(stage, c, tenant)
    opened = await stage.ask(c, lambda app: app.sessions.open(tenant, request))
    stage.seen.sessions[name] = opened.session.session_id


async def _placed_on(stage: Stage, c: Command, tenant: str) -> str:
    """A request id whose session will be placed where the script wants it."""
    built = stage.world
    directory = SessionDirectory(built.store, built.gateway_config)
    snapshot = built.gateways[stage.via(c)].app.fleet.snapshot
    for number in range(MAX_NAMES_TRIED):
        request_id = f"{c.words[0]}{number}"
        session_id = await directory.new_session_id(tenant, request_id)
        wanted = PlacementRequest(session_id, built.engine.model)
        decision = place(snapshot, wanted, built.gateway_config.placement)
        chosen = decision.replica.ref.replica_id if isinstance(decision, Decision) else ""
        if chosen == c.options["on"]:
            return request_id
    raise BadScript(f"no session would be placed on {c.options['on']} now")


async def do_fork(stage: Stage, c: Command) -> None:
    """Forks a session."""
    request = session_pb2.ForkSessionRequest(
        request_id=c.options["as"], session_id=stage.seen.sessions[c.words[0]]
    )
    if "at" in c.options:
        request.at_turn_index = int(c.options["at"])
    forked = await stage.ask(c, lambda app: app.sessions.fork(TENANT, request))
    stage.seen.sessions[c.options["as"]] = forked.session.session_id


async def do_get(stage: Stage, c: Command) -> None:
    """Asks for a session."""
    tenant = c.options.get("tenant", TENANT)
    request = session_pb2.GetSessionRequest(session_id=stage.seen.sessions[c.words[0]])
    got = await stage.ask(c, lambda app: app.sessions.get(tenant, request))
    stage.seen.say(f"{c.words[0]}: {session_pb2.SessionState.Name(got.session.state)[14:]}")


async def do_suspend(stage: Stage, c: Command) -> None:
    """Suspends a session."""
    request = session_pb2.SuspendSessionRequest(session_id=stage.seen.sessions[c.words[0]])
    await stage.ask(c, lambda app: app.sessions.suspend(TENANT, request))


async def do_unsuspend(stage: Stage, c: Command) -> None:
    """Resumes a session."""
    request = session_pb2.ResumeSessionRequest(session_id=stage.seen.sessions[c.words[0]])
    await stage.ask(c, lambda app: app.sessions.resume(TENANT, request))


async def do_close(stage: Stage, c: Command) -> None:
    """Closes a session."""
    request = session_pb2.CloseSessionRequest(
        session_id=stage.seen.sessions[c.words[0]], purge="purge" in c.words
    )
    await stage.ask(c, lambda app: app.sessions.close(TENANT, request))


async def do_cancel(stage: Stage, c: Command) -> None:
    """Cancels a turn."""
    session, turn_id = c.words
    request = session_pb2.CancelTurnRequest(
        session_id=stage.seen.sessions[session], turn_id=turn_id
    )
    told = await stage.ask(c, lambda app: app.sessions.cancel_turn(TENANT, request))
    status = pb.TurnStatus.Name(told.status).removeprefix("TURN_STATUS_")
    stage.seen.say(f"cancel {session} {turn_id}: {status.replace('UNSPECIFIED', 'not begun')}")


async def do_migrate(stage: Stage, c: Command) -> None:
    """An operator moves a session."""
    name, target = c.words[0], c.options["to"]
    options = MoveOptions(target, float(c.options.get("timeout", 10)), "recompute" in c.words)

    async def move(app: Any) -> Any:
        session = await app.store.get_session(stage.seen.sessions[name])
        return await app.migrations.migrate(session, options)

    result = await stage.ask(c, move)
    copied = result.bytes_copied // stage.world.engine.info().page_bytes
    how = f"{result.verified_tokens} tokens of KV verified, {copied} pages copied"
    how += ", with its running turn" if result.running_turn else ""
    why = f": {result.detail}" if result.detail else ""
    stage.seen.say(
        f"migrate {name} to {target}: {'moved' if result.moved else 'stays'} ({how}){why}"
    )


COMMANDS: CommandTable = table_of(
    do_open,
    do_fork,
    do_get,
    do_suspend,
    do_unsuspend,
    do_close,
    do_cancel,
    do_migrate,
)
