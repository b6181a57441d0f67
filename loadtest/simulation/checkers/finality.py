"""What a suspend or a close makes final, where the store loses writes.

Once a session is suspended or closed it has no owner and its record takes no repair: what was lost
before, and not put back by then, is lost for good, and no answer of these calls says so. So the
gateway asks the owner first. Only what was missing before and after is given up: its owner was gone
or could not be asked. Of a session that is gone at once nobody can see what was put back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from loadtest.simulation.checkers.checks import check_heard
from loadtest.simulation.clients.agents import Agent
from statestore.records import SessionState

UNREPAIRED = "a session is suspended or closed before what the store lost is put back"
"""How often that happened, among the counts of a history."""


@asynccontextmanager
async def made_final(agent: Agent) -> AsyncIterator[None]:
    """Suspend or close the session meanwhile. The store does not lose that again."""
    async with agent.unforgotten():
        missing = await _missing(agent) if agent.lossy else set()
        yield
        session = await agent.world.store.get_session(agent.session_id)
        if session is not None:
            missing &= await _missing(agent) if missing else set()
        if missing and (session is None or session.state is not SessionState.OPEN):
            agent.world.coverage[UNREPAIRED] += session is not None
            agent.known_head = None
            for turn_id in sorted(missing):
                agent.give_up(turn_id)


async def _missing(agent: Agent) -> set[str]:
    """Turns that were heard, and are not in the store as they were heard."""
    store = agent.world.store
    session = await store.get_session(agent.session_id)
    if session is None:
        return set()
    ledger = await store.read_tokens(session, 0, session.head.length)
    salt = await store.tenant_salt(session.tenant)
    turns = {turn.spec.turn_id: turn for turn in await store.get_turns(session, 0, 1000)}
    missing: set[str] = set()
    for heard in agent.heard:
        if heard.start is not None and not heard.given_up:
            turn = turns.get(heard.turn_id)
            if turn is None or check_heard(heard, turn, ledger, salt):
                missing.add(heard.turn_id)
    return missing
