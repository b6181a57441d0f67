"""What simulated agents do with their sessions beside running turns: fork, suspend, resume, close.

Each is checked at once, as far as it does not depend on what else goes on, and forks become agents
of their own, so that everything that is checked of a session is checked of them too.
"""

from __future__ import annotations

import anyio
from sessile.v1 import session_pb2

from gateway.core.errors import NotFound, SessionClosed, SessionSuspended, TurnInProgress
from loadtest.simulation.checkers.finality import made_final
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.tenancy import look_round
from statestore.records import Session, SessionState

FORK_TURNS = 2
VANISH_SHARE = 0.04
"""Of the turns: their client leaves, and nobody comes for the session any more."""


async def live(agent: Agent, agents: list[Agent], turns: int) -> None:
    """Opens a session and runs turns in it, with the pauses of an agent's tools. Forks are added
    to ``agents``."""
    await agent.open()
    if agent.may(0.1):
        await _suspend_for_a_while(agent)
    await _work(agent, agents, turns)


async def run_once(agent: Agent) -> None:
    """Opens a session for one turn."""
    await agent.open()
    await agent.turn()


async def _work(agent: Agent, agents: list[Agent], turns: int) -> None:
    async with anyio.create_task_group() as forks:
        for index in range(turns):
            if agent.closed:
                return
            if agent.may(0.15):
                forks.start_soon(fork, agent, agents, f"{agent.name}.{index}")
            if agent.may(VANISH_SHARE):
                await agent.vanish()
                return
            await agent.turn()
            if agent.may(0.1):
                await look_round(agent)
            await agent.pause()
            if agent.may(0.15):
                await _suspend_for_a_while(agent)
    if agent.closed:
        return
    # Its forks may be closed already, or go on without it.
    if agent.may(0.2):
        await close(agent, purge=agent.may(0.5))


async def fork(parent: Agent, agents: list[Agent], name: str) -> None:
    """Forks, perhaps in mid-turn: at the last boundary then (P20). A repeat finds the same fork."""
    await parent.pause()
    try:
        async with parent.unforgotten():
            child = await _fork(parent, agents, name)
        await _work(child, agents, FORK_TURNS)
    except (NotFound, SessionClosed):
        closed = parent.closed or parent.closing or parent.operated
        parent.expect(closed, "P20: an open session cannot be forked")


async def _fork(parent: Agent, agents: list[Agent], name: str) -> Agent:
    before = await _stored(parent)
    request = session_pb2.ForkSessionRequest(request_id=name, session_id=parent.session_id)
    first, second = [
        await parent.ask(lambda app: app.sessions.fork(parent.tenant, request)) for _ in range(2)
    ]
    child = parent.child(name, first.session.session_id)
    agents.append(child)
    parent.forks += 1
    child.expect(second.session.session_id == child.session_id, "P3: forked twice by one request")
    inherited = first.session.turn_index
    after = await _stored(parent)
    between = (
        before is not None
        and after is not None
        and (before.turn_index <= inherited <= after.turn_index)
    )
    child.expect(between, f"P20: forked after {inherited} turns")
    forked = await _stored(child)
    if forked is not None and after is not None:
        same = await parent.world.store.get_turns(after, 0, inherited)
        child.expect(
            await parent.world.store.get_turns(forked, 0, inherited) == same,
            "P20: its inherited turns are not its parent's",
        )
    return child


async def _suspend_for_a_while(agent: Agent) -> None:
    """A suspended session has no owner, refuses turns and loses nothing."""
    agent.minds_itself = True
    try:
        async with made_final(agent):
            before = await _suspend(agent)
        if before is not None:
            await _resume(agent, before)
    finally:
        agent.minds_itself = False


async def _suspend(agent: Agent) -> Session | None:
    """The session as it is then; None if a turn runs."""
    suspend = session_pb2.SuspendSessionRequest(session_id=agent.session_id)
    try:
        await agent.ask(lambda app: app.sessions.suspend(agent.tenant, suspend), repeatable=False)
    except TurnInProgress:
        return None  # the turn that was asked for beside another one runs on
    if agent.may(0.5):
        await agent.ask(lambda app: app.sessions.suspend(agent.tenant, suspend), repeatable=False)
    before = await _stored(agent)
    agent.expect(_is(before, SessionState.SUSPENDED), "I3: suspended, the store has it otherwise")
    agent.suspensions += 1
    await agent.be_refused(SessionSuspended)
    return before


async def _resume(agent: Agent, before: Session) -> None:
    await agent.pause()
    if agent.may(0.1):
        await close(agent, purge=False)
        return
    agent.expect(await _stored(agent) == before, "P2: something wrote to a suspended session")
    resume = session_pb2.ResumeSessionRequest(session_id=agent.session_id)
    async with agent.unforgotten():
        await agent.ask(lambda app: app.sessions.resume(agent.tenant, resume), repeatable=False)
        # As good as new: were its next placement lost, another gateway could place it anew before
        # its owner has noticed, and the owner would be fenced with what it alone holds.
        agent.opened_at = anyio.current_time()


async def close(agent: Agent, *, purge: bool) -> None:
    """A closed session takes no turn; a purged one is gone soon."""
    agent.minds_itself = True
    async with made_final(agent):
        await _close(agent, purge=purge)


async def _close(agent: Agent, *, purge: bool) -> None:
    request = session_pb2.CloseSessionRequest(session_id=agent.session_id, purge=purge)
    await _remember(agent)
    agent.closing = True
    try:
        await agent.ask(lambda app: app.sessions.close(agent.tenant, request))
    except NotFound:
        agent.expect(purge, "I9: a session that was to be kept is gone")  # the answer was lost
    if not purge and agent.may(0.3):
        await agent.ask(lambda app: app.sessions.close(agent.tenant, request))
    agent.closed, agent.purged = True, purge
    stored = await _stored(agent)
    gone = stored is None and purge
    agent.expect(gone or _is(stored, SessionState.CLOSED), "P2: closed, the store has it otherwise")
    if stored is not None:
        await _remember(agent)
    agent.said_more = agent.said_more and stored is None
    await agent.be_refused(SessionClosed, NotFound)


async def _remember(agent: Agent) -> None:
    """Keeps what the session said, for when it is gone."""
    stored = await _stored(agent)
    if stored is not None:
        agent.said_more = stored.active_turn_id is not None
        agent.said = list(await agent.world.store.read_tokens(stored, 0, stored.head.length))


async def _stored(agent: Agent) -> Session | None:
    return await agent.world.store.get_session(agent.session_id)


def _is(session: Session | None, state: SessionState) -> bool:
    return session is not None and session.state is state and session.owner is None
