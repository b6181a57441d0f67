"""Replicas that a gateway can be tested against: a real ledger behind them, a made-up model.

A fake owns sessions, journals before it delivers and obeys the store like a worker, but its
"model" answers at every position with a hash of the ledger before it, and it can be told to die,
freeze, lose its connections, disown its sessions or spoil a move. For virtual time: streams poll.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from gateway.app.frames import frame
from gateway.app.ports import ReplicaLost
from gateway.core.errors import NotFound, NotOwner, Overloaded, SessileError, TurnConflict
from statestore.digest import RollingDigest
from statestore.ports import (
    Append,
    Appended,
    SessionStore,
    StoreError,
    TurnBegun,
    TurnEnded,
    TurnExists,
    TurnResumed,
)
from statestore.records import (
    Epoch,
    FinishReason,
    Position,
    ReplicaRef,
    ReplicaRegistration,
    Turn,
    TurnResult,
    TurnSpec,
    TurnStatus,
)
from statestore.replica_info import ReplicaLoad
from tests.support.fleets import details

POLL_S = 0.001
BEAT_S = 0.5
FINGERPRINT = bytes.fromhex("aa" * 16)
INPUT_TOKENS = (11, 12, 13)
REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: types_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: types_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: types_pb2.FINISH_REASON_ERROR,
}


async def until(condition: Callable[[], bool]) -> None:
    """Polls: time is virtual, and fakes are simpler without events."""
    while not condition():  # noqa: ASYNC110
        await anyio.sleep(POLL_S)


def next_token(before: Position) -> int:
    """The model: a hash of the whole context, so a lost or repeated token shows."""
    return int.from_bytes(before.digest[:4], "big")


@dataclass
class Run:
    """One turn being generated, whoever listens."""

    turn: Turn
    epoch: Epoch
    digest: RollingDigest
    tokens: list[tuple[int, int, bytes]] = field(default_factory=list)
    """(position, token, digest after it), journalled."""
    finished: types_pb2.TurnFinished | None = None
    error: SessileError | None = None
    redirect: types_pb2.TurnRedirect | None = None
    held_by: str = ""
    at_boundary: bool = False

    @property
    def over(self) -> bool:
        return self.finished is not None or self.error is not None or self.redirect is not None


class FakeReplica:
    """One process; implements ``ReplicaClient`` for itself."""

    def __init__(
        self, store: SessionStore, name: str, tasks: TaskGroup, step_s: float, output_tokens: int
    ) -> None:
        self.store = store
        self.name = name
        self.endpoint = f"{name}:1"
        self.step_s = step_s
        self.output_tokens = output_tokens
        self.ref = ReplicaRef(name, 0)
        self.dispatches: list[pb.DispatchTurnRequest] = []
        self.released: list[pb.ReleaseSessionRequest] = []
        self.calls: list[str] = []
        self.runs: dict[str, Run] = {}
        self.dead = False
        self.frozen = False
        self.cut = 0
        """Connections broken off so far; the process lives."""
        self.disown = 0
        """So many dispatches are answered NOT_OWNER."""
        self.overloaded = 0
        self.garbage = b""
        """Sent instead of the end of a stream."""
        self.load = ReplicaLoad(free_pages=4096, prefill_tokens_per_s=2000.0)
        """What its heartbeat tells."""
        self.fail: dict[str, SessileError] = {}
        """Raised by these calls."""
        self.verified_tokens: int | None = None
        """Imports verify only this far."""
        self.on_import: Callable[[], object] | None = None
        self._tasks = tasks
        self._beat = 0

    async def start(self) -> None:
        registration = ReplicaRegistration(self.name, details(self.endpoint).to_json())
        self.ref = await self.store.register_replica(registration)
        self._tasks.start_soon(self._heartbeat)

    async def _heartbeat(self) -> None:
        ref = self.ref
        while not self.dead and self.ref == ref:
            if not self.frozen:
                self._beat += 1
                with suppress(StoreError):
                    await self.store.heartbeat(ref, self._beat, self.load.to_json())
            await anyio.sleep(BEAT_S)

    # -- turns --------------------------------------------------------------------------------

    async def dispatch_turn(
        self, request: pb.DispatchTurnRequest, timeout_s: float
    ) -> AsyncGenerator[bytes, None]:
        del timeout_s
        self.dispatches.append(request)
        cut = self.cut
        await self._reach()
        if self.disown:
            self.disown -= 1
            raise NotOwner("not mine")
        if self.overloaded:
            self.overloaded -= 1
            raise Overloaded("full", retry_after_ms=50)
        wanted = ReplicaRef(request.replica.replica_id, request.replica.incarnation)
        if wanted != self.ref:
            raise NotOwner(f"this is {self.ref}")
        run, attached = await self._run(request)
        yield self._accepted(run, attached)
        sent = request.turn.resume_from.length or run.turn.output_start.length
        while True:
            await self._reach()
            if cut != self.cut:
                raise ReplicaLost("the path broke", refused=False)
            fresh = [t for t in run.tokens if t[0] >= sent]
            for position, token, digest in fresh:
                tokens = types_pb2.TurnTokens(
                    position=position, token_ids=[token], digest=digest, text=f" {token}"
                )
                yield frame(types_pb2.TurnEvent(tokens=tokens))
                sent = position + 1
            if run.finished is not None and self.garbage:
                yield self.garbage
            if run.finished is not None:
                yield frame(types_pb2.TurnEvent(finished=run.finished))
                return
            if run.redirect is not None:
                yield frame(types_pb2.TurnEvent(redirect=run.redirect))
                return
            if run.error is not None:
                raise run.error
            await anyio.sleep(POLL_S)

    async def _reach(self) -> None:
        await anyio.sleep(POLL_S)
        if self.dead:
            raise ReplicaLost("connection refused", refused=True)
        await until(lambda: not self.frozen)

    def _accepted(self, run: Run, attached: bool) -> bytes:
        start = run.turn.output_start
        accepted = types_pb2.TurnAccepted(
            turn_id=run.turn.spec.turn_id,
            turn_index=run.turn.index,
            output_start=types_pb2.Position(length=start.length, digest=start.digest),
            seed=7,
            attempt=run.turn.attempt,
            replica=types_pb2.ReplicaRef(
                replica_id=self.ref.replica_id, incarnation=self.ref.incarnation
            ),
            attached=attached,
        )
        return frame(types_pb2.TurnEvent(accepted=accepted))

    async def _run(self, request: pb.DispatchTurnRequest) -> tuple[Run, bool]:
        turn = request.turn
        epoch = Epoch(request.epoch.number, request.epoch.nonce)
        live = self.runs.get(turn.session_id)
        same = live is not None and live.turn.spec.turn_id == turn.turn_id
        if live is not None and same and not live.over and live.epoch == epoch:
            return live, True
        session = await self.store.get_session(turn.session_id)
        if session is None or session.tenant != request.tenant:
            raise NotFound("no such session", reason="SESSION_NOT_FOUND")
        salt = await self.store.tenant_salt(session.tenant)
        ledger = await self.store.read_tokens(session, 0, session.head.length)
        digest = RollingDigest.of(salt, ledger)
        stored = await self.store.get_turn(turn.session_id, turn.turn_id)
        if stored is not None and stored.status.ended:
            return self._replayed(stored, salt, ledger), True
        if stored is None:
            if turn.attach_only:
                raise NotFound("no such turn", reason="TURN_NOT_FOUND")
            run = await self._begin(turn, epoch, session.head, digest)
        else:
            outcome = await self.store.resume_turn(turn.session_id, epoch, turn.turn_id)
            if isinstance(outcome, TurnEnded):
                return self._replayed(outcome.turn, salt, ledger), True
            if not isinstance(outcome, TurnResumed):
                raise NotOwner(f"resume: {outcome}")
            run = Run(outcome.turn, epoch, digest)
            run.tokens = _journalled(salt, ledger, outcome.turn)
        self.runs[turn.session_id] = run
        self._tasks.start_soon(self._generate, turn.session_id, run)
        return run, stored is not None

    async def _begin(
        self,
        turn: types_pb2.RunTurnRequest,
        epoch: Epoch,
        head: Position,
        digest: RollingDigest,
    ) -> Run:
        digest.update(INPUT_TOKENS)
        spec = TurnSpec(turn.turn_id, b"i" * 16, b"body", turn.timeout_ms or 600_000)
        outcome = await self.store.begin_turn(
            turn.session_id,
            epoch,
            head,
            spec,
            INPUT_TOKENS,
            digest.position(),
            token_fingerprint=FINGERPRINT,
        )
        if isinstance(outcome, TurnBegun):
            return Run(outcome.turn, epoch, digest)
        if isinstance(outcome, TurnExists):
            raise TurnConflict("began twice")
        raise NotOwner(f"begin: {outcome}")

    def _replayed(self, stored: Turn, salt: bytes, ledger: list[int]) -> Run:
        run = Run(stored, Epoch(0, b""), RollingDigest(salt))
        run.tokens = _journalled(salt, ledger, stored)
        run.finished = _finished(stored)
        return run

    async def _generate(self, session_id: str, run: Run) -> None:
        spec, start = run.turn.spec, run.turn.output_start.length
        while not run.over and not self.dead:
            await anyio.sleep(self.step_s)
            while self.frozen or run.held_by:
                run.at_boundary = True
                await anyio.sleep(POLL_S)
            run.at_boundary = False
            if run.over or self.dead:
                return
            before = run.digest.position()
            token = next_token(before)
            after = run.digest.copy()
            after.update([token])
            last = after.position().length - start >= self.output_tokens
            result = TurnResult(TurnStatus.COMMITTED, FinishReason.LENGTH) if last else None
            append = Append(
                session_id, run.epoch, spec.turn_id, before, [token], after.position(), result
            )
            outcome = (await self.store.append_many([append]))[0]
            if self.dead:
                return
            match outcome:
                case Appended():
                    run.digest = after
                    run.tokens.append((before.length, token, after.position().digest))
                    if last:
                        stored = await self.store.get_turn(session_id, spec.turn_id)
                        assert stored is not None
                        run.finished = _finished(stored)
                case TurnEnded(turn):
                    run.finished = _finished(turn)
                case StoreError():
                    continue
                case _:
                    run.error = NotOwner(f"fenced: {outcome}")

    # -- the rest -----------------------------------------------------------------------------

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        await self._reach()
        if name in self.fail:
            raise self.fail[name]

    async def stop_turn(self, request: pb.StopTurnRequest, timeout_s: float) -> pb.StopTurnResponse:
        await self._called("stop_turn")
        return pb.StopTurnResponse(stopped=request.session_id in self.runs)

    async def hand_over(self, request: pb.HandOverRequest, timeout_s: float) -> pb.HandOverResponse:
        await self._called("hand_over")
        run = self.runs.get(request.session_id)
        session = await self.store.get_session(request.session_id)
        assert session is not None
        if run is None or run.over:
            return pb.HandOverResponse(
                head=types_pb2.Position(length=session.head.length, digest=session.head.digest)
            )
        run.held_by = request.migration_id
        await until(lambda: run.at_boundary or run.over)
        head = run.digest.position()
        return pb.HandOverResponse(
            head=types_pb2.Position(length=head.length, digest=head.digest),
            turn_id="" if run.over else run.turn.spec.turn_id,
        )

    async def abort_hand_over(
        self, request: pb.AbortHandOverRequest, timeout_s: float
    ) -> pb.AbortHandOverResponse:
        await self._called("abort_hand_over")
        run = self.runs.get(request.session_id)
        if run is not None and run.held_by == request.migration_id:
            run.held_by = ""
        return pb.AbortHandOverResponse()

    async def import_session(
        self, request: pb.ImportSessionRequest, timeout_s: float
    ) -> pb.ImportSessionResponse:
        await self._called("import_session")
        if self.on_import is not None:
            self.on_import()
        asked = request.up_to.length - request.up_to.length % 16
        verified = asked if self.verified_tokens is None else min(asked, self.verified_tokens)
        await anyio.sleep(0.005)
        return pb.ImportSessionResponse(
            verified=types_pb2.Position(length=verified),
            pages=verified // 16,
            bytes_copied=verified,
        )

    async def release_session(
        self, request: pb.ReleaseSessionRequest, timeout_s: float
    ) -> pb.ReleaseSessionResponse:
        await self._called("release_session")
        self.released.append(request)
        run = self.runs.pop(request.session_id, None)
        if run is not None and not run.over:
            run.redirect = request.moved_to
        return pb.ReleaseSessionResponse(released=run is not None)

    async def read_turns(
        self, request: pb.ReadTurnsRequest, timeout_s: float
    ) -> pb.ReadTurnsResponse:
        await self._called("read_turns")
        answer = pb.ReadTurnsResponse()
        answer.transcript.turns.add(turn_id="read by " + self.name)
        return answer

    async def set_draining(
        self, request: pb.SetDrainingRequest, timeout_s: float
    ) -> pb.SetDrainingResponse:
        await self._called("set_draining")
        return pb.SetDrainingResponse()


class FakeFleet:
    """Implements ``ReplicaClients`` over fakes; start them in a task group of the test."""

    def __init__(self, store: SessionStore, tasks: TaskGroup) -> None:
        self.store = store
        self.replicas: dict[str, FakeReplica] = {}
        self._tasks = tasks

    async def start(
        self, name: str, *, step_s: float = 0.02, output_tokens: int = 8
    ) -> FakeReplica:
        """A process; again with the same name it is the next incarnation."""
        replica = FakeReplica(self.store, name, self._tasks, step_s, output_tokens)
        await replica.start()
        self.replicas[name] = replica
        return replica

    def at(self, endpoint: str) -> FakeReplica:
        return self.replicas[endpoint.partition(":")[0]]


class SeededIds:
    """Ids for reproducible tests."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)

    def nonce(self) -> bytes:
        return self._random.randbytes(8)

    def token(self) -> str:
        return "".join(self._random.choices("abcdefghijklmnopqrstuvwxyz234567", k=16))


def _journalled(salt: bytes, ledger: list[int], turn: Turn) -> list[tuple[int, int, bytes]]:
    start, end = turn.output_start.length, turn.output_end.length
    digest = RollingDigest.of(salt, ledger[:start])
    tokens = []
    for position in range(start, end):
        digest.update([ledger[position]])
        tokens.append((position, ledger[position], digest.position().digest))
    return tokens


def _finished(turn: Turn) -> types_pb2.TurnFinished:
    assert turn.result is not None
    return types_pb2.TurnFinished(
        status=types_pb2.TurnStatus.Value(f"TURN_STATUS_{turn.status}"),
        reason=REASONS[turn.result.reason],
        end=types_pb2.Position(length=turn.output_end.length, digest=turn.output_end.digest),
        error=turn.result.error,
    )
