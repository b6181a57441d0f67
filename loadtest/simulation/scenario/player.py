"""Plays a scenario: carries out its commands and checks what they leave behind."""

from __future__ import annotations

import random

import anyio
from anyio.abc import TaskGroup

from gateway.config import GatewayConfig
from gateway.core.errors import DataLoss, SessileError
from loadtest.simulation.checkers import aftermath, checks
from loadtest.simulation.loop import run
from loadtest.simulation.phases import EXPORT_LEASE_S, SETTLE_S
from loadtest.simulation.scenario import processes, sessions, show, turns
from loadtest.simulation.scenario.script import BadScript, Block, Command
from loadtest.simulation.scenario.stage import CommandFunction, CommandTable, Stage
from loadtest.simulation.scenario.transcript import refusal
from loadtest.simulation.scenario.watch import Watch
from loadtest.simulation.world import World, world

DELAY_S = 0.001
COMMANDS: CommandTable = {
    **processes.COMMANDS,
    **sessions.COMMANDS,
    **turns.COMMANDS,
    **show.COMMANDS,
}


class Player:
    """Carries out commands; what is seen meanwhile is told by :meth:`seen`."""

    def __init__(self, built: World, tasks: TaskGroup) -> None:
        self._stage = Stage(built, tasks, Watch(built))

    async def do(self, command: Command) -> None:
        """One command, to its end unless it is one for the background."""
        action = COMMANDS.get(command.verb)
        if action is None:
            raise BadScript(f"there is no command {command.verb!r}")
        if not command.background:
            await self._finish(action, command)
            return
        self._stage.background += 1

        async def finish() -> None:
            await self._finish(action, command)
            self._stage.background -= 1
            self._stage.seen.notify()

        self._stage.tasks.start_soon(finish, name=command.verb)

    async def _finish(self, action: CommandFunction, command: Command) -> None:
        try:
            await action(self._stage, command)
        except SessileError as error:
            self._stage.seen.say(f"{command.verb} {' '.join(command.words)}: {refusal(error)}")

    def seen(self) -> str:
        """What happened since the last call."""
        return self._stage.seen.seen()

    async def check(self) -> list[str]:
        """Everything wrong after a script: what the histories check, for the script's sessions."""
        await anyio.sleep(SETTLE_S)
        if aftermath.check_replicas(self._stage.world):
            await anyio.sleep(EXPORT_LEASE_S)
        found = [*self._stage.watch.violations, *aftermath.check_replicas(self._stage.world)]
        if self._stage.background:
            found.append("a command in the background has not come to its end")
        for name, session_id in self._stage.seen.sessions.items():
            found += [f"{name}: {what}" for what in await self._check_session(session_id)]
        return found

    async def _check_session(self, session_id: str) -> list[str]:
        store = self._stage.world.store
        everyone = self._stage.seen.clients.values()
        clients = [it for it in everyone if it.heard.session_id == session_id]
        session = await store.get_session(session_id)
        if session is None:
            return [f"{it.name}: {what}" for it in clients for what in it.heard.violations]
        ledger = await store.read_tokens(session, 0, session.head.length)
        turns = await store.get_turns(session, 0, 1000)
        salt = await store.tenant_salt(session.tenant)
        heard = [it.heard for it in clients]
        if any(isinstance(it.error, DataLoss) for it in heard):
            for it in heard:
                it.given_up = True  # they were told that what they heard is gone
        return checks.check_session(session, turns, ledger, salt, self._stage.world.engine, heard)


def play(blocks: list[Block]) -> list[str]:
    """What is seen in each block. Raises BadScript, AssertionError for a broken invariant."""
    return run(lambda: _play(blocks))


async def _play(blocks: list[Block]) -> list[str]:
    outputs: list[str] = []
    async with (
        world(random.Random("scenario"), gateway_config=GatewayConfig()) as built,
        anyio.create_task_group() as tasks,
    ):
        built.network.min_delay_s = built.network.max_delay_s = DELAY_S
        player = Player(built, tasks)
        for block in blocks:
            for line in block.commands:
                await player.do(Command.of(line))
            outputs.append(player.seen())
        found = await player.check()
        tasks.cancel_scope.cancel()
    assert not found, "\n".join(found)
    return outputs
