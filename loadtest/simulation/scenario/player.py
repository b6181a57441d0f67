"""Carries out the commands of a scenario."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import anyio
from anyio.abc import TaskGroup
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.directory import SessionDirectory
from gateway.app.migration import MoveOptions
from gateway.config import GatewayConfig
from gateway.core.errors import DataLoss, SessileError
from gateway.core.machines import ReplicaState
from gateway.core.placement import Decision, PlacementRequest, place
from loadtest.simulation import aftermath, checks
from loadtest.simulation.agents import TENANT
from loadtest.simulation.heard import TurnHeard
from loadtest.simulation.loop import current_process, run
from loadtest.simulation.network import Call
from loadtest.simulation.phases import EXPORT_LEASE_S, SETTLE_S
from loadtest.simulation.redis import Fault
from loadtest.simulation.scenario.script import BadScript, Block, Command
from loadtest.simulation.scenario.transcript import Client, Transcript, refusal
from loadtest.simulation.scenario.watch import Watch
from loadtest.simulation.world import SimGateway, SimReplica, World, world
from statestore.executor import ScriptCall

DELAY_S = 0.001
CALL_S = 120.0
PATIENCE_S = 60.0
"""Virtual seconds that ``until`` waits at most."""
MAX_NAMES_TRIED = 256
SERVING = (ReplicaState.READY, ReplicaState.DRAINING)


@dataclass
class _Loss:
    """One call that gets no answer."""

    fault: Fault
    script: str


class Player:
    """Carries out commands; what is seen meanwhile is told by :meth:`seen`."""

    def __init__(self, built: World, tasks: TaskGroup) -> None:
        self._world = built
        self._tasks = tasks
        self._seen = Transcript()
        self._watch = built.server.watch = Watch(built)
        self._usual_fault, built.server.fault = built.server.fault, self._fault
        self._losses: list[_Loss] = []
        self._storeless: set[str] = set()
        self._background = 0

    async def do(self, command: Command) -> None:
        """One command, to its end unless it is one for the background."""
        action: Callable[[Command], Awaitable[None]] | None
        action = getattr(self, f"do_{command.verb}", None)
        if action is None:
            raise BadScript(f"there is no command {command.verb!r}")
        if not command.background:
            await self._finish(action, command)
            return
        self._background += 1

        async def finish() -> None:
            await self._finish(action, command)
            self._background -= 1
            self._seen.notify()

        self._tasks.start_soon(finish, name=command.verb)

    async def _finish(self, action: Callable[[Command], Awaitable[None]], command: Command) -> None:
        try:
            await action(command)
        except SessileError as error:
            self._seen.say(f"{command.verb} {' '.join(command.words)}: {refusal(error)}")

    def seen(self) -> str:
        """What happened since the last call."""
        return self._seen.seen()

    # -- processes ----------------------------------------------------------------------------

    async def do_fleet(self, c: Command) -> None:
        middle = c.words.index("gateways")
        for setting, value in c.options.items():
            self._set(setting, value)
        for name in c.words[:middle]:
            await self._world.start_replica(name)
        for name in c.words[middle + 1 :]:
            self._world.start_gateway(name)
        await self._until_ready()
        self._seen.say(f"{', '.join(c.words[:middle])} ready")

    def _set(self, setting: str, value: str) -> None:
        built, (group, name) = self._world, setting.split(".")
        if group == "engine":
            built.engine = replace(built.engine, **{name: int(value)})  # type: ignore[arg-type]
        elif group == "turn":
            built.turn_limits = replace(built.turn_limits, **{name: float(value)})  # type: ignore[arg-type]
        else:
            old = getattr(built.gateway_config, group)
            new = replace(old, **{name: type(getattr(old, name))(value)})
            built.gateway_config = replace(built.gateway_config, **{group: new})

    async def do_start(self, c: Command) -> None:
        (name,) = c.words
        for setting, value in c.options.items():
            self._set(setting, value)
        if name in self._world.gateways or name.startswith("g"):
            self._world.start_gateway(name)
        else:
            await self._world.start_replica(name)
        await self._until_ready()

    async def do_kill(self, c: Command) -> None:
        self._world.kill(self._node(c))

    async def do_freeze(self, c: Command) -> None:
        self._node(c).process.stop()

    async def do_thaw(self, c: Command) -> None:
        self._node(c).process.resume()

    async def do_cut(self, c: Command) -> None:
        if c.words[1] == "store":
            self._storeless.add(c.words[0])
        else:
            self._world.network.cut(*c.words)

    async def do_heal(self, c: Command) -> None:
        del c
        self._storeless.clear()
        self._world.network.heal()

    async def do_corrupt(self, c: Command) -> None:
        self._world.network.corrupt_page_rate = float(c.words == ("pages",))

    async def do_drain(self, c: Command) -> None:
        name, shutdown = c.words[0], "shutdown" in c.words
        limit_s = float(c.options.get("timeout", 10))
        last: Any = None

        async def handler(app: Any, call: Call) -> None:
            async with aclosing(app.drains.drain(name, limit_s, shutdown)) as progress:
                async for step in progress:
                    await call.put(step)

        messages = self._world.network.stream(self._via(c), handler, CALL_S)
        async with aclosing(messages) as steps:
            async for step in steps:
                last = step
        self._seen.say(
            f"drain {name}: {last.moved_with_kv} moved with KV, {last.moved_without_kv} without,"
            f" {last.remaining} left"
        )

    # -- the store ----------------------------------------------------------------------------

    async def do_store(self, c: Command) -> None:
        self._world.weather.down = c.words == ("down",)

    async def do_lose(self, c: Command) -> None:
        """Acknowledged writes, in a fail-over of the store; or one request or reply to come."""
        if c.words[1:] == ("writes",):
            before = self._watch.before
            for _ in range(int(c.words[0]) - 1):
                before.pop()
            self._world.server.restore(before.pop())
        else:
            fault = {"request": Fault.REQUEST_LOST, "reply": Fault.REPLY_LOST}[c.words[0]]
            self._losses.append(_Loss(fault, c.options["of"]))

    def _fault(self, call: ScriptCall) -> Fault:
        process = current_process()
        if process is not None and process.name in self._storeless:
            return Fault.REQUEST_LOST
        for loss in self._losses:
            if process is not None and loss.script == call.script.name:
                self._losses.remove(loss)
                return loss.fault
        return self._usual_fault(call)

    # -- sessions -----------------------------------------------------------------------------

    async def do_open(self, c: Command) -> None:
        (name,), tenant = c.words, c.options.get("tenant", TENANT)
        request = session_pb2.OpenSessionRequest(request_id=name)
        if "leading" in c.options:
            manual = "Read all of this. " * (int(c.options["leading"]) // 18)
            request.messages.add(role=pb.Message.ROLE_SYSTEM, content=manual)
        if "on" in c.options:
            request.request_id = await self._placed_on(c, tenant)
        opened = await self._ask(c, lambda app: app.sessions.open(tenant, request))
        self._seen.sessions[name] = opened.session.session_id

    async def _placed_on(self, c: Command, tenant: str) -> str:
        """A request id whose session will be placed where the script wants it."""
        built = self._world
        directory = SessionDirectory(built.store, built.gateway_config)
        snapshot = built.gateways[self._via(c)].app.fleet.snapshot
        for number in range(MAX_NAMES_TRIED):
            request_id = f"{c.words[0]}{number}"
            session_id = await directory.new_session_id(tenant, request_id)
            wanted = PlacementRequest(session_id, built.engine.model)
            decision = place(snapshot, wanted, built.gateway_config.placement)
            chosen = decision.replica.ref.replica_id if isinstance(decision, Decision) else ""
            if chosen == c.options["on"]:
                return request_id
        raise BadScript(f"no session would be placed on {c.options['on']} now")

    async def do_fork(self, c: Command) -> None:
        request = session_pb2.ForkSessionRequest(
            request_id=c.options["as"], session_id=self._seen.sessions[c.words[0]]
        )
        if "at" in c.options:
            request.at_turn_index = int(c.options["at"])
        forked = await self._ask(c, lambda app: app.sessions.fork(TENANT, request))
        self._seen.sessions[c.options["as"]] = forked.session.session_id

    async def do_get(self, c: Command) -> None:
        tenant = c.options.get("tenant", TENANT)
        request = session_pb2.GetSessionRequest(session_id=self._seen.sessions[c.words[0]])
        got = await self._ask(c, lambda app: app.sessions.get(tenant, request))
        self._seen.say(f"{c.words[0]}: {session_pb2.SessionState.Name(got.session.state)[14:]}")

    async def do_suspend(self, c: Command) -> None:
        request = session_pb2.SuspendSessionRequest(session_id=self._seen.sessions[c.words[0]])
        await self._ask(c, lambda app: app.sessions.suspend(TENANT, request))

    async def do_unsuspend(self, c: Command) -> None:
        request = session_pb2.ResumeSessionRequest(session_id=self._seen.sessions[c.words[0]])
        await self._ask(c, lambda app: app.sessions.resume(TENANT, request))

    async def do_close(self, c: Command) -> None:
        request = session_pb2.CloseSessionRequest(
            session_id=self._seen.sessions[c.words[0]], purge="purge" in c.words
        )
        await self._ask(c, lambda app: app.sessions.close(TENANT, request))

    async def do_cancel(self, c: Command) -> None:
        session, turn_id = c.words
        request = session_pb2.CancelTurnRequest(
            session_id=self._seen.sessions[session], turn_id=turn_id
        )
        told = await self._ask(c, lambda app: app.sessions.cancel_turn(TENANT, request))
        status = pb.TurnStatus.Name(told.status).removeprefix("TURN_STATUS_")
        self._seen.say(f"cancel {session} {turn_id}: {status.replace('UNSPECIFIED', 'not begun')}")

    async def do_migrate(self, c: Command) -> None:
        name, target = c.words[0], c.options["to"]
        options = MoveOptions(target, float(c.options.get("timeout", 10)), "recompute" in c.words)

        async def move(app: Any) -> Any:
            session = await app.store.get_session(self._seen.sessions[name])
            return await app.migrations.migrate(session, options)

        result = await self._ask(c, move)
        copied = result.bytes_copied // self._world.engine.info().page_bytes
        how = f"{result.verified_tokens} tokens of KV verified, {copied} pages copied"
        how += ", with its running turn" if result.running_turn else ""
        why = f": {result.detail}" if result.detail else ""
        self._seen.say(
            f"migrate {name} to {target}: {'moved' if result.moved else 'stays'} ({how}){why}"
        )

    # -- turns --------------------------------------------------------------------------------

    async def do_turn(self, c: Command) -> None:
        session, turn_id = c.words[:2]
        name = c.options.get("as", turn_id)
        params = pb.SamplingParams(max_tokens=int(c.options.get("max_tokens", 30)))
        params.ignore_eos = "eos" not in c.words
        if "stop" in c.options:
            params.stop.append(c.options["stop"])
        said = c.options.get("say", "What do you see from where you are?")
        request = pb.RunTurnRequest(
            session_id=self._seen.sessions[session],
            turn_id=turn_id,
            messages=[pb.Message(role=pb.Message.ROLE_USER, content=said)],
            params=params,
            timeout_ms=int(float(c.options.get("timeout", 60)) * 1000),
        )
        if "after" in c.options:
            known = self._seen.clients[c.options["after"]].heard
            assert known.finished is not None
            request.precondition.head.CopyFrom(known.finished.end)
            request.precondition.turn_index = known.index + 1
        client = Client(
            name,
            TurnHeard(request.session_id, turn_id, request),
            c.options.get("tenant", TENANT),
            float(c.options.get("slow", 0)),
        )
        self._seen.clients[name] = client
        self._listen(client, request, self._via(c))

    async def do_again(self, c: Command) -> None:
        """The same call a second time, by another client (or by one that forgot all it heard)."""
        self._repeat(c, attach_only=False)

    async def do_attach(self, c: Command) -> None:
        self._repeat(c, attach_only=True)

    def _repeat(self, c: Command, *, attach_only: bool) -> None:
        first, name = self._seen.clients[c.words[0]], c.options["as"]
        request = pb.RunTurnRequest()
        request.CopyFrom(first.heard.request)
        request.attach_only = attach_only
        heard = TurnHeard(request.session_id, request.turn_id, request)
        client = self._seen.clients[name] = Client(name, heard, first.tenant, 0.0)
        self._listen(client, request, self._via(c))

    async def do_resume(self, c: Command) -> None:
        """The client goes on from the last token it has."""
        client = self._seen.clients[c.words[0]]
        request = pb.RunTurnRequest()
        request.CopyFrom(client.heard.request)
        position = client.heard.resume_from
        if position is not None:
            request.resume_from.CopyFrom(position)
        self._listen(client, request, self._via(c))

    async def do_disconnect(self, c: Command) -> None:
        self._seen.clients[c.words[0]].scope.cancel()
        await self._until(lambda: not self._seen.clients[c.words[0]].listening, "")

    def _listen(self, client: Client, request: pb.RunTurnRequest, gateway: str) -> None:
        client.listening, client.scope = True, anyio.CancelScope()
        client.heard.begin_stream()

        async def handler(app: Any, call: Call) -> None:
            await app.turns.run(client.tenant, request, CALL_S, call.put)

        async def listen() -> None:
            try:
                with client.scope:
                    stream = self._world.network.stream(gateway, handler, CALL_S)
                    async with aclosing(stream):
                        async for message in stream:
                            for event in pb.TurnStream.FromString(message).events:
                                client.heard.hear(event)
                                self._seen.hear(client, event)
                            await anyio.sleep(client.slow_s)
            except SessileError as error:
                client.heard.error = error
                self._seen.tell(client, refusal(error))
            finally:
                client.listening = False
                self._seen.notify()

        self._tasks.start_soon(listen, name=client.name)

    # -- waiting and looking ------------------------------------------------------------------

    async def do_until(self, c: Command) -> None:
        name, *what = c.words
        client, before = self._seen.clients[name], len(self._seen.clients[name].kinds)

        def reached() -> bool:
            if what[-1] == "tokens" and len(client.heard.tokens) >= int(what[0]):
                return True
            return not client.listening or what[0] in client.kinds[before:]

        await self._until(reached, name)

    async def do_wait(self, c: Command) -> None:
        await anyio.sleep(float(c.words[0]))

    async def do_join(self, c: Command) -> None:
        del c
        await self._until(lambda: not self._background, "join")

    async def do_show(self, c: Command) -> None:
        for name in c.words:
            if name in self._seen.sessions:
                await self._show_session(name)
            elif name in self._seen.clients:
                heard = self._seen.clients[name].heard
                self._seen.say(f"{name}: {len(heard.tokens)} tokens, {len(heard.text)} characters")
            else:
                self._show_replica(self._world.replicas[name])

    async def _show_session(self, name: str) -> None:
        session_id, store = self._seen.sessions[name], self._world.store
        session = await store.get_session(session_id)
        if session is None:
            self._seen.say(f"{name}: nothing is stored")
            return
        owner = session.owner
        where = "nobody's" if owner is None else f"{self._seen.ref(owner.replica)}'s"
        epochs = self._watch.epochs.get(session_id, [])
        epoch = 1 + epochs.index(session.epoch) if session.epoch in epochs else 0
        moving = f", moving to {session.migration.target.replica_id}" if session.migration else ""
        self._seen.say(
            f"{name}: {session.state}, {where}, epoch {epoch}, {session.head.length} tokens,"
            f" turn {session.turn_index}{moving}"
        )
        for turn in await store.get_turns(session, 0, 1000):
            how = f" ({turn.result.reason})" if turn.result else ""
            why = f": {turn.result.error}" if turn.result and turn.result.error else ""
            self._seen.say(
                f"  {turn.spec.turn_id}: {turn.status}{how}, attempt {turn.attempt},"
                f" output {turn.output_start.length}..{turn.output_end.length}{why}"
            )

    def _show_replica(self, replica: SimReplica) -> None:
        assert replica.ref is not None
        assert replica.app is not None
        views = [g.app.fleet.snapshot.state_of(replica.ref) for g in self._world.live_gateways()]
        if replica.ended:
            self._seen.say(
                f"{self._seen.ref(replica.ref)}: ended, seen {'/'.join(dict.fromkeys(views))}"
            )
            return
        held = ", ".join(sorted(map(self._seen.name, replica.app.session_ids()))) or "no session"
        pages = replica.engine.load().pinned_pages
        seen = "/".join(dict.fromkeys(views))
        self._seen.say(f"{self._seen.ref(replica.ref)}: {seen}, holds {held}, {pages} pages pinned")

    # -- the end ------------------------------------------------------------------------------

    async def check(self) -> list[str]:
        """Everything wrong after a script: what the histories check, for the script's sessions."""
        await anyio.sleep(SETTLE_S)
        if aftermath.check_replicas(self._world):
            await anyio.sleep(EXPORT_LEASE_S)
        found = [*self._watch.violations, *aftermath.check_replicas(self._world)]
        if self._background:
            found.append("a command in the background has not come to its end")
        for name, session_id in self._seen.sessions.items():
            found += [f"{name}: {what}" for what in await self._check_session(session_id)]
        return found

    async def _check_session(self, session_id: str) -> list[str]:
        store = self._world.store
        clients = [it for it in self._seen.clients.values() if it.heard.session_id == session_id]
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
        return checks.check_session(session, turns, ledger, salt, self._world.engine, heard)

    # -- inside -------------------------------------------------------------------------------

    async def _ask(self, c: Command, call: Callable[[Any], Awaitable[Any]]) -> Any:
        return await self._world.network.unary(self._via(c), call, CALL_S)

    def _via(self, c: Command) -> str:
        return c.options.get("via") or self._world.live_gateways()[0].name

    def _node(self, c: Command) -> SimReplica | SimGateway:
        (name,) = c.words
        return self._world.replicas.get(name) or self._world.gateways[name]

    async def _until_ready(self) -> None:
        """Every gateway sees every replica that runs, and none starting."""

        def ready() -> bool:
            alive = [replica.ref for replica in self._world.live_replicas()]
            return all(
                ref is not None and gateway.app.fleet.snapshot.state_of(ref) in SERVING
                for gateway in self._world.live_gateways()
                for ref in alive
            )

        await anyio.sleep(0.01)
        with anyio.fail_after(PATIENCE_S):
            while not ready():  # noqa: ASYNC110 - gateways tell nobody
                await anyio.sleep(0.05)
        for replica in self._world.live_replicas():
            self._seen.ref(replica.ref)

    async def _until(self, reached: Callable[[], object], name: str) -> None:
        with anyio.move_on_after(PATIENCE_S) as scope:
            while not reached():
                await self._seen.changed.wait()
        if scope.cancelled_caught:
            self._seen.say(f"{name}: not within {PATIENCE_S:.0f} s")


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
