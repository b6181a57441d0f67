"""A client reads all it may see, and tries to touch what it may not (P17, I10)."""

from __future__ import annotations

from typing import Any

from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import NotFound, NotOwner, SessileError
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.client import CALL_S


async def look_round(agent: Agent) -> None:
    """Reads what was said in its session, lists its tenant's, and reaches for another tenant's."""
    await _read_back(agent)
    every = session_pb2.ListSessionsRequest(page_size=100)
    listed = await agent.ask(lambda app: app.sessions.list(agent.tenant, every))
    tenants = agent.world.tenants
    for session in listed.sessions:
        mine = tenants.get(session.session_id, agent.tenant) == agent.tenant
        agent.expect(mine, f"I10: {agent.tenant} lists {session.session_id}")
    foreign = [name for name, tenant in sorted(tenants.items()) if tenant != agent.tenant]
    if foreign:
        await _touch(agent, agent.draw.choice(foreign))


async def _read_back(agent: Agent) -> None:
    read = session_pb2.GetTranscriptRequest(session_id=agent.session_id)
    try:
        transcript = await agent.ask(lambda app: app.sessions.transcript(agent.tenant, read))
    except (NotOwner, NotFound):
        return  # purged by whoever may
    if agent.lossy:
        return  # it may lack what the session's owner is yet to put back
    texts = {turn.turn_id: turn.output_text for turn in transcript.turns}
    for heard in agent.turns:
        if heard.finished is not None and heard.turn_id in texts:
            same = texts[heard.turn_id] == heard.text
            agent.expect(same, f"P17: the transcript of {heard.turn_id} says something else")


async def _touch(agent: Agent, session_id: str) -> None:
    what, request = agent.draw.choice(
        [
            ("get", session_pb2.GetSessionRequest(session_id=session_id)),
            ("transcript", session_pb2.GetTranscriptRequest(session_id=session_id)),
            ("fork", session_pb2.ForkSessionRequest(session_id=session_id, request_id="theft")),
            ("cancel_turn", session_pb2.CancelTurnRequest(session_id=session_id, turn_id="t0")),
            ("close", session_pb2.CloseSessionRequest(session_id=session_id, purge=True)),
            ("run", pb.RunTurnRequest(session_id=session_id, turn_id="t0", attach_only=True)),
        ]
    )

    async def theft(app: Any) -> Any:
        if what == "run":
            return await app.turns.run(agent.tenant, request, CALL_S, _drop)
        return await getattr(app.sessions, what)(agent.tenant, request)

    try:
        await agent.ask(theft)
    except SessileError as error:
        same = isinstance(error, NotFound) and error.message == f"no session {session_id!r}"
        agent.expect(same, f"I10: {what} of another tenant's session tells: {error.message}")
        return
    agent.expect(False, f"I10: {agent.tenant} may {what} {session_id}")


async def _drop(message: bytes) -> None:
    """A sink for what must never be sent."""
    del message
