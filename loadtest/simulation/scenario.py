"""Scenario scripts: text files of commands to a simulated Sessile, each with what was seen.

The format is that of cockroachdb's ``datadriven`` tests: commands, a line ``----``, and what
clients heard and the store held until the last of them was done, up to a blank line. Lines that
begin with ``#`` explain. :func:`play` runs a script in a deterministic world (no random faults,
constant delays) and returns what was seen; whether it is as written is the caller's business.

Nothing unstable is shown: epochs are counted per session, incarnations of a replica are primed
(``r1``, ``r1'``), ids are the script's names. A script that breaks an invariant fails, whatever it
says: the witness and the checks of the random histories watch it too.

Commands (``&`` at the end: in the background, until ``join``; ``via g2``: through that gateway):

    fleet r1 r2 gateways g1 g2 [times.progress_s=1] [turn.detach_grace_s=2] [engine.page_size=16]
    start r1 [engine.page_size=16]            kill|freeze|thaw r1           drain r1 [shutdown]
    open s [on r1] [tenant=t] [leading=300]   fork s as f [at 1]            close s [purge]
    suspend|unsuspend s                       get s [tenant=t]
    migrate s to r2 [recompute]               cancel s t1
    turn s t1 [max_tokens=30] [slow=0.2] [after=t0] [timeout=5] [stop=text] [say=text] [eos]
    again|attach t1 as x                      resume t1                     disconnect t1
    until t1 10 tokens|accepted|moved|waiting|ends                          wait 2, join
    store down|up                             lose 3 writes|reply of append|request of append
    cut r1 g1|store, heal                     corrupt pages|nothing         show s|r1|t1
"""

from __future__ import annotations

import itertools
import random
import re
import shlex
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import anyio
from anyio.abc import TaskGroup
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.directory import SessionDirectory
from gateway.app.migration import MoveOptions
from gateway.app.ports import ReplicaLost
from gateway.config import GatewayConfig
from gateway.core.errors import DataLoss, SessileError
from gateway.core.machines import ReplicaState
from gateway.core.placement import Decision, PlacementRequest, place
from loadtest.simulation import checks
from loadtest.simulation import world as stage
from loadtest.simulation.agents import TENANT, TurnHeard
from loadtest.simulation.history import EXPORT_LEASE_S, SETTLE_S
from loadtest.simulation.loop import current_process, run
from loadtest.simulation.network import Call
from loadtest.simulation.redis import Fault
from loadtest.simulation.witness import Witness
from loadtest.simulation.world import SimGateway, SimReplica, World, world
from statestore import keys
from statestore.executor import Reply, ScriptCall
from statestore.records import Epoch, ReplicaRef
from workers.engines.sim.config import SimConfig

DELAY_S = 0.001
CALL_S = 120.0
PATIENCE_S = 60.0
"""Virtual seconds that ``until`` waits at most."""
MAX_NAMES_TRIED = 256
MAX_WRITES_LOST = 64
SERVING = (ReplicaState.READY, ReplicaState.DRAINING)
PREPOSITIONS = frozenset(("via", "as", "on", "to", "at", "of"))


# -- the format --------------------------------------------------------------------------------


class BadScript(ValueError):
    """The script cannot be read or played."""


@dataclass(frozen=True, slots=True)
class Block:
    """Comments and commands as written, and what follows them."""

    text: str
    expected: str

    @property
    def commands(self) -> list[str]:
        lines = (line.strip() for line in self.text.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def parse(text: str) -> list[Block]:
    """The blocks of a script."""
    blocks: list[Block] = []
    lines = iter(text.splitlines())
    head: list[str] = []
    for line in lines:
        if line != "----":
            head.append(line)
            continue
        expected = list(itertools.takewhile(str.strip, lines))
        blocks.append(Block("\n".join(head).strip("\n"), "\n".join(expected)))
        head = []
    if any(line.strip() for line in head):
        raise BadScript(f"no ---- after {head!r}")
    return blocks


def render(blocks: list[Block], outputs: list[str]) -> str:
    """The script with other outputs."""
    parts = [f"{b.text}\n----\n{out}\n" for b, out in zip(blocks, outputs, strict=True)]
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class Command:
    """``verb words… [preposition word]… [key=value]… [&]``."""

    verb: str
    words: tuple[str, ...]
    options: dict[str, str]
    background: bool

    @classmethod
    def of(cls, line: str) -> Command:
        verb, *rest = shlex.split(line)
        background = rest[-1:] == ["&"]
        words: list[str] = []
        options: dict[str, str] = {}
        parts = iter(rest[:-1] if background else rest)
        for part in parts:
            key, equals, value = part.partition("=")
            if part in PREPOSITIONS:
                options[part] = next(parts)
            elif equals:
                options[key] = value
            else:
                words.append(part)
        return cls(verb, tuple(words), options, background)


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
        player = Player(_Stage(**{f.name: getattr(built, f.name) for f in fields(built)}), tasks)
        for block in blocks:
            for line in block.commands:
                await player.do(Command.of(line))
            outputs.append(player.seen())
        found = await player.check()
        tasks.cancel_scope.cancel()
    assert not found, "\n".join(found)
    return outputs


# -- the stage ---------------------------------------------------------------------------------


@dataclass
class _Stage(World):
    """Shares everything with the world it is made of, except which engine replicas start with."""

    engine: SimConfig = stage.ENGINE

    async def start_replica(self, name: str) -> None:
        with self.in_force():
            await super().start_replica(name)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Whoever asks for the simulation's engine gets this one."""
        usual = stage.ENGINE
        stage.ENGINE = checks.ENGINE = self.engine  # type: ignore[attr-defined]
        try:
            yield
        finally:
            stage.ENGINE = checks.ENGINE = usual  # type: ignore[attr-defined]


class _Watch(Witness):
    """Remembers what the store was before each write to a session, and counts epochs."""

    def __init__(self, built: World) -> None:
        super().__init__(built.server.peek)
        self.epochs: dict[str, list[Epoch]] = {}
        self.before: deque[Any] = deque(maxlen=MAX_WRITES_LOST)
        self._server = built.server
        self._now = self._server.snapshot()

    def __call__(self, call: ScriptCall, reply: Reply) -> None:
        super().__call__(call, reply)
        if call.script.name.startswith("read_"):
            return
        for key in call.keys[:1]:
            _, found, session_id = key.partition(":s:")
            record = self._server.peek(keys.session_key(session_id)) if found else None
            if isinstance(record, dict) and b"epoch" in record:
                self.before.append(self._now)
                epoch = Epoch(int(record[b"epoch"]), record[b"nonce"])
                known = self.epochs.setdefault(session_id, [])
                if epoch.number and epoch not in known:
                    known.append(epoch)
        self._now = self._server.snapshot()


@dataclass(eq=False)
class _Client:
    """A caller of RunTurn."""

    name: str
    heard: TurnHeard
    tenant: str
    slow_s: float
    kinds: list[str] = field(default_factory=list)
    listening: bool = False
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    tokens_from: int | None = None
    """First position of a run of tokens that is not shown yet."""


@dataclass
class _Loss:
    """One call that gets no answer."""

    fault: Fault
    script: str


class Player:
    """Carries out commands; what is seen meanwhile is told by :meth:`seen`."""

    def __init__(self, built: _Stage, tasks: TaskGroup) -> None:
        self._world = built
        self._tasks = tasks
        self._watch = built.server.watch = _Watch(built)
        self._usual_fault, built.server.fault = built.server.fault, self._fault
        self._lines: list[str] = []
        self._clients: dict[str, _Client] = {}
        self._sessions: dict[str, str] = {}
        self._incarnations: dict[str, list[int]] = {}
        self._losses: list[_Loss] = []
        self._storeless: set[str] = set()
        self._background = 0
        self._changed = anyio.Event()

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
            self._notify()

        self._tasks.start_soon(finish, name=command.verb)

    async def _finish(self, action: Callable[[Command], Awaitable[None]], command: Command) -> None:
        try:
            await action(command)
        except SessileError as error:
            self._say(f"{command.verb} {' '.join(command.words)}: {_refusal(error)}")

    def seen(self) -> str:
        """What happened since the last call."""
        self._show_all_tokens()
        lines, self._lines = self._lines, []
        return "\n".join(lines) or "ok"

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
        self._say(f"{', '.join(c.words[:middle])} ready")

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
        self._say(
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
        self._sessions[name] = opened.session.session_id

    async def _placed_on(self, c: Command, tenant: str) -> str:
        """A request id whose session will be placed where the script wants it."""
        built = self._world
        directory = SessionDirectory(built.store, built.gateway_config)
        snapshot = built.gateways[self._via(c)].app.fleet.snapshot
        for number in range(MAX_NAMES_TRIED):
            request_id = f"{c.words[0]}{number}"
            session_id = await directory.new_session_id(tenant, request_id)
            wanted = PlacementRequest(session_id, stage.ENGINE.model)
            decision = place(snapshot, wanted, built.gateway_config.placement)
            chosen = decision.replica.ref.replica_id if isinstance(decision, Decision) else ""
            if chosen == c.options["on"]:
                return request_id
        raise BadScript(f"no session would be placed on {c.options['on']} now")

    async def do_fork(self, c: Command) -> None:
        request = session_pb2.ForkSessionRequest(
            request_id=c.options["as"], session_id=self._sessions[c.words[0]]
        )
        if "at" in c.options:
            request.at_turn_index = int(c.options["at"])
        forked = await self._ask(c, lambda app: app.sessions.fork(TENANT, request))
        self._sessions[c.options["as"]] = forked.session.session_id

    async def do_get(self, c: Command) -> None:
        tenant = c.options.get("tenant", TENANT)
        request = session_pb2.GetSessionRequest(session_id=self._sessions[c.words[0]])
        got = await self._ask(c, lambda app: app.sessions.get(tenant, request))
        self._say(f"{c.words[0]}: {session_pb2.SessionState.Name(got.session.state)[14:]}")

    async def do_suspend(self, c: Command) -> None:
        request = session_pb2.SuspendSessionRequest(session_id=self._sessions[c.words[0]])
        await self._ask(c, lambda app: app.sessions.suspend(TENANT, request))

    async def do_unsuspend(self, c: Command) -> None:
        request = session_pb2.ResumeSessionRequest(session_id=self._sessions[c.words[0]])
        await self._ask(c, lambda app: app.sessions.resume(TENANT, request))

    async def do_close(self, c: Command) -> None:
        request = session_pb2.CloseSessionRequest(
            session_id=self._sessions[c.words[0]], purge="purge" in c.words
        )
        await self._ask(c, lambda app: app.sessions.close(TENANT, request))

    async def do_cancel(self, c: Command) -> None:
        session, turn_id = c.words
        request = session_pb2.CancelTurnRequest(session_id=self._sessions[session], turn_id=turn_id)
        told = await self._ask(c, lambda app: app.sessions.cancel_turn(TENANT, request))
        status = pb.TurnStatus.Name(told.status).removeprefix("TURN_STATUS_")
        self._say(f"cancel {session} {turn_id}: {status.replace('UNSPECIFIED', 'not begun')}")

    async def do_migrate(self, c: Command) -> None:
        name, target = c.words[0], c.options["to"]
        options = MoveOptions(target, float(c.options.get("timeout", 10)), "recompute" in c.words)

        async def move(app: Any) -> Any:
            session = await app.store.get_session(self._sessions[name])
            return await app.migrations.migrate(session, options)

        result = await self._ask(c, move)
        copied = result.bytes_copied // stage.ENGINE.info().page_bytes
        how = f"{result.verified_tokens} tokens of KV verified, {copied} pages copied"
        how += ", with its running turn" if result.running_turn else ""
        why = f": {result.detail}" if result.detail else ""
        self._say(
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
            session_id=self._sessions[session],
            turn_id=turn_id,
            messages=[pb.Message(role=pb.Message.ROLE_USER, content=said)],
            params=params,
            timeout_ms=int(float(c.options.get("timeout", 60)) * 1000),
        )
        if "after" in c.options:
            known = self._clients[c.options["after"]].heard
            assert known.finished is not None
            request.precondition.head.CopyFrom(known.finished.end)
            request.precondition.turn_index = known.index + 1
        client = _Client(
            name,
            TurnHeard(request.session_id, turn_id, request),
            c.options.get("tenant", TENANT),
            float(c.options.get("slow", 0)),
        )
        self._clients[name] = client
        self._listen(client, request, self._via(c))

    async def do_again(self, c: Command) -> None:
        """The same call a second time, by another client (or by one that forgot all it heard)."""
        self._repeat(c, attach_only=False)

    async def do_attach(self, c: Command) -> None:
        self._repeat(c, attach_only=True)

    def _repeat(self, c: Command, *, attach_only: bool) -> None:
        first, name = self._clients[c.words[0]], c.options["as"]
        request = pb.RunTurnRequest()
        request.CopyFrom(first.heard.request)
        request.attach_only = attach_only
        heard = TurnHeard(request.session_id, request.turn_id, request)
        client = self._clients[name] = _Client(name, heard, first.tenant, 0.0)
        self._listen(client, request, self._via(c))

    async def do_resume(self, c: Command) -> None:
        """The client goes on from the last token it has."""
        client = self._clients[c.words[0]]
        request = pb.RunTurnRequest()
        request.CopyFrom(client.heard.request)
        position = client.heard.resume_from
        if position is not None:
            request.resume_from.CopyFrom(position)
        self._listen(client, request, self._via(c))

    async def do_disconnect(self, c: Command) -> None:
        self._clients[c.words[0]].scope.cancel()
        await self._until(lambda: not self._clients[c.words[0]].listening, "")

    def _listen(self, client: _Client, request: pb.RunTurnRequest, gateway: str) -> None:
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
                                self._hear(client, event)
                            await anyio.sleep(client.slow_s)
            except SessileError as error:
                client.heard.error = error
                self._tell(client, _refusal(error))
            finally:
                client.listening = False
                self._notify()

        self._tasks.start_soon(listen, name=client.name)

    def _hear(self, client: _Client, event: pb.TurnEvent) -> None:
        kind = event.WhichOneof("event") or "?"
        client.kinds.append(kind)
        if kind == "tokens":
            if client.tokens_from is None:
                client.tokens_from = event.tokens.position
        elif kind == "accepted":
            accepted = event.accepted
            line = f"accepted at {accepted.output_start.length} on {self._ref(accepted.replica)}"
            line += f", attempt {accepted.attempt}" if accepted.attempt > 1 else ""
            self._tell(client, line + (", attached" if accepted.attached else ""))
        elif kind == "waiting":
            self._tell(client, f"waits ({_word(pb.TurnWaiting.Reason, event.waiting.reason)})")
        elif kind == "moved":
            moved, reason = event.moved, _word(pb.TurnMoved.Reason, event.moved.reason)
            line = f"moved from {self._ref(getattr(moved, 'from'))} to {self._ref(moved.to)}"
            self._tell(client, f"{line} ({reason}), attempt {moved.attempt}")
        elif kind == "finished":
            end = event.finished
            line = (
                f"{_word(pb.TurnStatus, end.status).upper()} ({_word(pb.FinishReason, end.reason)})"
            )
            line += f" at {end.end.length}, {end.usage.cached_tokens} cached"
            self._tell(client, line + (f": {end.error}" if end.error else ""))
        self._notify()

    # -- waiting and looking ------------------------------------------------------------------

    async def do_until(self, c: Command) -> None:
        name, *what = c.words
        client, before = self._clients[name], len(self._clients[name].kinds)

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
            if name in self._sessions:
                await self._show_session(name)
            elif name in self._clients:
                heard = self._clients[name].heard
                self._say(f"{name}: {len(heard.tokens)} tokens, {len(heard.text)} characters")
            else:
                self._show_replica(self._world.replicas[name])

    async def _show_session(self, name: str) -> None:
        session_id, store = self._sessions[name], self._world.store
        session = await store.get_session(session_id)
        if session is None:
            self._say(f"{name}: nothing is stored")
            return
        owner = session.owner
        where = "nobody's" if owner is None else f"{self._ref(owner.replica)}'s"
        epochs = self._watch.epochs.get(session_id, [])
        epoch = 1 + epochs.index(session.epoch) if session.epoch in epochs else 0
        moving = f", moving to {session.migration.target.replica_id}" if session.migration else ""
        self._say(
            f"{name}: {session.state}, {where}, epoch {epoch}, {session.head.length} tokens,"
            f" turn {session.turn_index}{moving}"
        )
        for turn in await store.get_turns(session, 0, 1000):
            how = f" ({turn.result.reason})" if turn.result else ""
            why = f": {turn.result.error}" if turn.result and turn.result.error else ""
            self._say(
                f"  {turn.spec.turn_id}: {turn.status}{how}, attempt {turn.attempt},"
                f" output {turn.output_start.length}..{turn.output_end.length}{why}"
            )

    def _show_replica(self, replica: SimReplica) -> None:
        assert replica.ref is not None
        assert replica.app is not None
        views = [g.app.fleet.snapshot.state_of(replica.ref) for g in self._world.live_gateways()]
        if replica.ended:
            self._say(f"{self._ref(replica.ref)}: ended, seen {'/'.join(dict.fromkeys(views))}")
            return
        held = ", ".join(sorted(map(self._name, replica.app.session_ids()))) or "no session"
        pages = replica.engine.load().pinned_pages
        seen = "/".join(dict.fromkeys(views))
        self._say(f"{self._ref(replica.ref)}: {seen}, holds {held}, {pages} pages pinned")

    # -- the end ------------------------------------------------------------------------------

    async def check(self) -> list[str]:
        """Everything wrong after a script: what the histories check, for the script's sessions."""
        with self._world.in_force():
            return await self._check()

    async def _check(self) -> list[str]:
        await anyio.sleep(SETTLE_S)
        if checks.check_replicas(self._world):
            await anyio.sleep(EXPORT_LEASE_S)
        found = [*self._watch.violations, *checks.check_replicas(self._world)]
        if self._background:
            found.append("a command in the background has not come to its end")
        for name, session_id in self._sessions.items():
            found += [f"{name}: {what}" for what in await self._check_session(session_id)]
        return found

    async def _check_session(self, session_id: str) -> list[str]:
        store = self._world.store
        clients = [it for it in self._clients.values() if it.heard.session_id == session_id]
        found = [f"{it.name}: {what}" for it in clients for what in it.heard.violations]
        session = await store.get_session(session_id)
        if session is None:
            return found
        ledger = await store.read_tokens(session, 0, session.head.length)
        turns = await store.get_turns(session, 0, 1000)
        salt = await store.tenant_salt(session.tenant)
        found += checks.check_ledger(session, turns, ledger, salt)
        if any(isinstance(it.heard.error, DataLoss) for it in clients):
            return found  # they were told that what they heard is gone
        by_id = {turn.spec.turn_id: turn for turn in turns}
        for client in clients:
            turn = by_id.get(client.heard.turn_id)
            if turn is not None:
                found += checks.check_heard(client.heard, turn, ledger, salt)
            elif client.heard.start is not None:
                found.append(f"I7: {client.name} was accepted and is not in the ledger")
        return found

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
            self._ref(replica.ref)

    async def _until(self, reached: Callable[[], object], name: str) -> None:
        with anyio.move_on_after(PATIENCE_S) as scope:
            while not reached():
                await self._changed.wait()
        if scope.cancelled_caught:
            self._say(f"{name}: not within {PATIENCE_S:.0f} s")

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _tell(self, client: _Client, line: str) -> None:
        self._show_tokens(client)
        if self._lines[-1:] != [f"{client.name}: {line}"]:
            self._lines.append(self._plain(f"{client.name}: {line}"))

    def _show_all_tokens(self) -> None:
        for client in self._clients.values():
            self._show_tokens(client)

    def _show_tokens(self, client: _Client) -> None:
        start, client.tokens_from = client.tokens_from, None
        if start is not None:
            assert client.heard.start is not None
            end = client.heard.start.length + len(client.heard.tokens)
            self._lines.append(f"{client.name}: tokens {start}..{end}")

    def _say(self, line: str) -> None:
        self._show_all_tokens()
        self._lines.append(self._plain(line))

    def _plain(self, line: str) -> str:
        """The line without what differs from run to run, or says nothing to a reader."""
        for name, session_id in self._sessions.items():
            line = line.replace(session_id, name)
        return re.sub(r"(\w+)#(\d+)", lambda m: self._ref(ReplicaRef(m[1], int(m[2]))), line)

    def _name(self, session_id: str) -> str:
        names = [name for name, known in self._sessions.items() if known == session_id]
        return names[0] if names else "?"

    def _ref(self, ref: Any) -> str:
        known = self._incarnations.setdefault(ref.replica_id, [])
        if ref.incarnation not in known:
            known.append(ref.incarnation)
        return str(ref.replica_id) + "'" * known.index(ref.incarnation)


def _word(enum: Any, value: int) -> str:
    """The last part of an enum value's name."""
    prefix = {"TurnStatus": "TURN_STATUS_", "FinishReason": "FINISH_REASON_"}
    name: str = enum.Name(value)
    return name.removeprefix(prefix.get(enum.DESCRIPTOR.name, "REASON_")).lower()


def _refusal(error: SessileError) -> str:
    if isinstance(error, ReplicaLost):
        return "connection lost"
    later = ", retry later" if error.retry_after_ms else ""
    return f"{error.reason}{later}"
