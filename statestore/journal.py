"""The part of the store that a turn runner uses: turns, ledgers, heartbeats."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio

from statestore import keys, replies
from statestore.digest import pack_tokens
from statestore.executor import Reply, ScriptCall, ScriptExecutor
from statestore.ports import (
    Append,
    Appended,
    AppendOutcome,
    BeginOutcome,
    Repair,
    RepairOutcome,
    ResumeOutcome,
    SessionWritten,
    StoreCorrupt,
    StoreError,
)
from statestore.records import (
    Epoch,
    LedgerPiece,
    Position,
    ReplicaRef,
    ReplicaRegistration,
    Session,
    StoreLimits,
    Turn,
    TurnContext,
    TurnSpec,
    UsageSum,
)
from statestore.script_runner import RetryPolicy, ScriptRunner, script_call

MAX_TURNS_PER_READ = 1000
MAX_TURN_BYTES_PER_READ = 4 << 20
"""No more turns are read once they have this many bytes: bounds what one read may bring."""
READ_PIECE_TOKENS = 1 << 16
"""Tokens of one ledger read: bounds how long one read occupies the server."""
PIECES_PER_READ = 16
"""Of one pipeline: bounds what one round trip brings."""
MAX_DETAILS_BYTES = 8192
CALL_KEY_BYTES = 8


class RedisJournal:
    """JournalPort over scripts. Raises StoreError; ValueError for calls that no caller should make
    (a malformed session id, positions that contradict the tokens)."""

    def __init__(
        self,
        executor: ScriptExecutor,
        *,
        limits: StoreLimits | None = None,
        retry: RetryPolicy | None = None,
        now: Callable[[], float] = anyio.current_time,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._limits = limits or StoreLimits()
        self._scripts = ScriptRunner(executor, retry or RetryPolicy(), now, sleep)
        self._random_bytes = random_bytes
        self._registered: dict[ReplicaRef, tuple[str, bool]] = {}
        """Of this process: its details, and whether it drains."""

    async def aclose(self) -> None:
        await self._scripts.aclose()

    # -- reads --------------------------------------------------------------------------------

    async def get_session(self, session_id: str) -> Session | None:
        try:
            call = script_call("read_session", [keys.session_key(session_id)], [])
        except ValueError:
            return None
        outcome = await self._outcome(call)
        return outcome.session if isinstance(outcome, SessionWritten) else None

    async def get_turn(self, session_id: str, turn_id: str) -> Turn | None:
        call = script_call("read_session", [keys.session_key(session_id)], [turn_id])
        (reply,) = await self._scripts.run(call)
        if not isinstance(replies.outcome(reply), SessionWritten):
            return None
        return replies.optional_turn(replies.items(reply)[3])

    async def get_turn_context(
        self, session_id: str, turn_id: str, tokens_from: int
    ) -> TurnContext | None:
        try:
            call = script_call(
                "read_session",
                [keys.session_key(session_id), keys.ledger_key(session_id)],
                [turn_id, max(tokens_from, 0), READ_PIECE_TOKENS],
            )
        except ValueError:
            return None
        (reply,) = await self._scripts.run(call)
        outcome = replies.outcome(reply)
        if not isinstance(outcome, SessionWritten):
            return None
        turn, start, tokens = replies.items(reply)[3:]
        piece = LedgerPiece(replies.number(start), replies.tokens(tokens))
        return TurnContext(outcome.session, replies.optional_turn(turn), piece)

    async def get_turns(self, session: Session, start: int, count: int) -> tuple[Turn, ...]:
        first = max(start, 0)
        until = first + min(count, MAX_TURNS_PER_READ)
        own_first = session.segments[-1].end_turn if session.segments else 0
        sources = [(s.ancestor_id, s.first_turn, s.end_turn) for s in session.segments]
        sources.append((session.session_id, own_first, until))
        wanted = [
            (source, max(first, begin), min(until, end))
            for source, begin, end in sources
            if max(first, begin) < min(until, end)
        ]
        found = await self._scripts.run(
            *(
                script_call(
                    "read_turns", [keys.session_key(source)], [begin, end, MAX_TURN_BYTES_PER_READ]
                )
                for source, begin, end in wanted
            )
        )
        turns: list[Turn] = []
        for (_, begin, end), reply in zip(wanted, found, strict=True):
            replies.outcome(reply)
            some = replies.items(replies.items(reply)[1])
            turns += map(replies.turn, some)
            if len(some) < end - begin:
                break
        return tuple(turns)

    async def read_tokens(
        self, session: Session, start: int, end: int, known: LedgerPiece | None = None
    ) -> list[int]:
        if known is None or known.end <= start or end <= known.start:
            return await self._read_pieces(_pieces(session, start, end))
        before = await self._read_pieces(_pieces(session, start, known.start))
        if len(before) < known.start - start:
            return before
        inside = known.tokens[max(start - known.start, 0) : end - known.start]
        after = await self._read_pieces(_pieces(session, known.end, end))
        return before + inside + after

    async def _read_pieces(self, pieces: Sequence[tuple[str, int, int]]) -> list[int]:
        """Joins pieces [(ledger, start, end)], up to the first that the store has less of."""
        tokens: list[int] = []
        for first in range(0, len(pieces), PIECES_PER_READ):
            some = pieces[first : first + PIECES_PER_READ]
            found = await self._scripts.run(
                *(
                    script_call("read_ledger", [keys.ledger_key(ledger)], [4 * at, 4 * until - 1])
                    for ledger, at, until in some
                )
            )
            for (_, start, end), reply in zip(some, found, strict=True):
                piece = replies.tokens(reply)
                tokens += piece
                if len(piece) < end - start:
                    return tokens
        return tokens

    # -- turns --------------------------------------------------------------------------------

    async def begin_turn(
        self,
        session_id: str,
        epoch: Epoch,
        expected: Position,
        spec: TurnSpec,
        input_tokens: Sequence[int],
        output_start: Position,
        *,
        token_fingerprint: bytes,
    ) -> BeginOutcome:
        _check_head(expected, input_tokens, output_start)
        begin = script_call(
            "begin",
            [keys.session_key(session_id), keys.ledger_key(session_id)],
            [
                *_epoch_args(epoch),
                *_position_args(expected),
                spec.turn_id,
                spec.input_digest,
                spec.body,
                spec.timeout_ms,
                pack_tokens(input_tokens),
                *_position_args(output_start),
                token_fingerprint,
                self._random_bytes(CALL_KEY_BYTES),
                self._limits.max_turns_per_session,
                self._limits.max_append_tokens,
            ],
        )
        due = self._due(session_id, spec.timeout_ms)
        outcome = replies.outcome((await self._scripts.run(due, begin))[1])
        if not isinstance(outcome, BeginOutcome):
            raise replies.unexpected(outcome)
        return outcome

    async def resume_turn(self, session_id: str, epoch: Epoch, turn_id: str) -> ResumeOutcome:
        call = script_call(
            "resume",
            [keys.session_key(session_id)],
            [
                *_epoch_args(epoch),
                turn_id,
                self._random_bytes(CALL_KEY_BYTES),
                self._limits.max_attempts_without_progress,
            ],
        )
        outcome = await self._outcome(call)
        if not isinstance(outcome, ResumeOutcome):
            raise replies.unexpected(outcome)
        return outcome

    async def append_many(self, appends: Sequence[Append]) -> list[AppendOutcome | StoreError]:
        """One attempt only: the journal repeats what failed, so that one silent shard does not
        hold back the acknowledgements of the others."""
        results = await self._scripts.once([self._append_call(append) for append in appends])
        return [
            _append_outcome(append, result) for append, result in zip(appends, results, strict=True)
        ]

    def _append_call(self, append: Append) -> ScriptCall:
        if len(append.tokens) > self._limits.max_append_tokens:
            raise ValueError(f"{len(append.tokens)} tokens are too many for one append")
        _check_head(append.expected, append.tokens, append.head)
        result = append.commit
        return script_call(
            "append",
            [keys.session_key(append.session_id), keys.ledger_key(append.session_id)],
            [
                *_epoch_args(append.epoch),
                append.turn_id,
                *_position_args(append.expected),
                *_position_args(append.head),
                pack_tokens(append.tokens),
                result.status.value if result else "",
                result.reason.value if result else "",
                result.text_end if result else 0,
                result.usage if result else b"",
                result.error if result else "",
            ],
        )

    async def repair(self, repair: Repair) -> RepairOutcome:
        session_id = repair.session_id
        if repair.keep + len(repair.tokens) != repair.head.length:
            raise ValueError("the kept and the given tokens do not add up to the head")
        call = script_call(
            "repair",
            [keys.session_key(session_id), keys.ledger_key(session_id), keys.refs_key(session_id)],
            [
                *_epoch_args(repair.epoch),
                repair.owner.replica_id,
                repair.owner.incarnation,
                *_epoch_args(repair.observed_epoch),
                *_position_args(repair.observed),
                repair.keep,
                pack_tokens(repair.tokens),
                *_position_args(repair.head),
                repair.active_turn_id or "",
                repair.turn_index,
                session_id,
                repair.token_fingerprint,
                *(arg for turn in repair.turns for arg in replies.turn_args(turn)),
            ],
        )
        # Due soon: the sweep then files it by the deadline that was written back.
        (_, _, reply) = await self._scripts.run(
            self._due(session_id, self._limits.index_grace_ms),
            self._index_replica(session_id, repair.owner),
            call,
        )
        outcome = replies.outcome(reply) or Appended(repair.head)
        if not isinstance(outcome, RepairOutcome):
            raise replies.unexpected(outcome)
        return outcome

    # -- replicas and tenants -----------------------------------------------------------------

    async def register_replica(self, registration: ReplicaRegistration) -> ReplicaRef:
        if len(registration.details.encode()) > MAX_DETAILS_BYTES:
            raise ValueError(f"the details of a replica have at most {MAX_DETAILS_BYTES} bytes")
        replica_id = registration.replica_id
        call = script_call("register", [keys.FLEET], [replica_id, registration.details, "", 0])
        (reply,) = await self._scripts.run(call)
        ref = ReplicaRef(replica_id, replies.number(replies.items(reply)[1]))
        self._registered[ref] = registration.details, False
        return ref

    async def heartbeat(
        self,
        ref: ReplicaRef,
        counter: int,
        load: str,
        usage: Mapping[str, UsageSum] | None = None,
    ) -> int | None:
        beat = script_call(
            "heartbeat", [keys.FLEET], [ref.replica_id, ref.incarnation, counter, load]
        )
        sums = [
            script_call(
                "usage_add",
                [keys.usage_key(tenant)],
                [ref.replica_id, ref.incarnation, it.number, it.tokens],
            )
            for tenant, it in (usage or {}).items()
        ]
        reply, *_ = await self._scripts.run(beat, *sums)
        registered = self._registered.get(ref)
        if replies.data(replies.items(reply)[0]) == b"unknown" and registered is not None:
            # The store lost the registration: only this process can write it back.
            details, draining = registered
            back = (ref.replica_id, details, ref.incarnation, int(draining))
            await self._status(script_call("register", [keys.FLEET], back))
            (reply,) = await self._scripts.run(beat)
        status, *before = replies.items(reply)
        if replies.data(status) == b"replaced":
            return None
        return replies.number(before[0]) if before else 0

    async def set_draining(self, ref: ReplicaRef, draining: bool) -> bool:
        if ref in self._registered:
            details, _ = self._registered[ref]
            self._registered[ref] = details, draining
        return await self._mark(ref, "draining", draining) == b"done"

    async def deregister_replica(self, ref: ReplicaRef) -> None:
        self._registered.pop(ref, None)
        await self._mark(ref, "gone", True)

    async def tenant_salt(self, tenant: str) -> bytes:
        call = script_call("tenant_salt", [keys.salt_key(tenant)], [self._random_bytes(32)])
        (reply,) = await self._scripts.run(call)
        return replies.data(reply)

    # -- shared -------------------------------------------------------------------------------

    async def _mark(self, ref: ReplicaRef, flag: str, value: bool) -> bytes:
        return await self._status(
            script_call(
                "mark_replica", [keys.FLEET], [ref.replica_id, ref.incarnation, flag, int(value)]
            )
        )

    async def _outcome(self, call: ScriptCall) -> object:
        (reply,) = await self._scripts.run(call)
        return replies.outcome(reply)

    async def _status(self, call: ScriptCall) -> bytes:
        (reply,) = await self._scripts.run(call)
        return replies.data(replies.items(reply)[0])

    def _due(self, session_id: str, in_ms: int) -> ScriptCall:
        return script_call("due", [keys.DUE], [session_id, in_ms, self._limits.index_grace_ms])

    def _index_replica(self, session_id: str, ref: ReplicaRef) -> ScriptCall:
        return script_call("index_add", [keys.replica_index_key(ref)], [session_id, 0])


def _append_outcome(append: Append, result: Reply | StoreError) -> AppendOutcome | StoreError:
    """A damaged record is a failure of its own append only."""
    if isinstance(result, StoreError):
        return result
    try:
        outcome = replies.outcome(result) or Appended(append.head)
    except StoreCorrupt as error:
        return error
    return outcome if isinstance(outcome, AppendOutcome) else replies.unexpected(outcome)


def _check_head(expected: Position, tokens: Sequence[int], head: Position) -> None:
    if expected.length + len(tokens) != head.length:
        raise ValueError(
            f"{expected.length} + {len(tokens)} tokens do not end at position {head.length}"
        )


def _pieces(session: Session, start: int, end: int) -> list[tuple[str, int, int]]:
    """Where tokens ``[start, end)`` are, in bounded pieces: (ledger, first, last in its string)."""
    sources = [(s.ancestor_id, s.start, s.end) for s in session.segments]
    sources.append((session.session_id, session.own_base, session.head.length))
    pieces: list[tuple[str, int, int]] = []
    for ledger_id, base, limit in sources:
        last = min(end, limit)
        pieces += (
            (ledger_id, at - base, min(last, at + READ_PIECE_TOKENS) - base)
            for at in range(max(start, base), last, READ_PIECE_TOKENS)
        )
    return pieces


def _epoch_args(epoch: Epoch) -> tuple[int, bytes]:
    return epoch.number, epoch.nonce


def _position_args(position: Position) -> tuple[int, bytes]:
    return position.length, position.digest
