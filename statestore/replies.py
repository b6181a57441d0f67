"""Between records and what scripts take and answer."""

from __future__ import annotations

import json
from collections.abc import Sequence

from statestore.digest import unpack_tokens
from statestore.executor import Reply
from statestore.keys import family_of
from statestore.ports import (
    EpochLost,
    Fenced,
    HeadMismatch,
    LimitReached,
    Missing,
    Refused,
    SessionWritten,
    StoreCorrupt,
    TurnBegun,
    TurnConflict,
    TurnEnded,
    TurnExists,
    TurnInProgress,
    TurnResumed,
    TurnTombstoned,
    TurnUnknown,
)
from statestore.records import (
    Epoch,
    FinishReason,
    Migration,
    Owner,
    Position,
    ReplicaRecord,
    ReplicaRef,
    Segment,
    Session,
    SessionState,
    Turn,
    TurnResult,
    TurnSpec,
    TurnStatus,
)
from statestore.scripts import SESSION_FIELDS, TURN_FIELDS

Arg = bytes | str | int


def outcome(reply: Reply) -> object:
    """The outcome (of ``ports.py``) that a script of one session names; None if it only says that
    it is done. Callers check that it is one of theirs."""
    try:
        return _outcome(reply)
    except (ValueError, TypeError, IndexError) as error:
        raise StoreCorrupt(f"an answer of a script cannot be read: {error}") from error


def _outcome(reply: Reply) -> object:
    kind, *rest = items(reply)
    match kind:
        case b"written" | b"purge":
            return SessionWritten(session(rest))
        case b"lost":
            return EpochLost(session(rest))
        case b"refused":
            return Refused(SessionState(text(rest[0])), text(rest[1]) or None)
        case b"missing":
            return Missing()
        case b"fenced":
            owner = ReplicaRef(text(rest[2]), number(rest[3])) if rest[2] else None
            return Fenced(Epoch(number(rest[0]), data(rest[1])), owner, rest[4] == 1)
        case b"mismatch":
            stored = Position(number(rest[0]), data(rest[1]))
            return HeadMismatch(stored, Epoch(number(rest[2]), data(rest[3])))
        case b"limit":
            return LimitReached(text(rest[0]))
        case b"begun":
            return TurnBegun(turn(rest[0]))
        case b"resumed":
            return TurnResumed(session(rest), turn(rest[2]))
        case b"exists":
            return TurnExists(turn(rest[0]))
        case b"conflict":
            return TurnConflict(turn(rest[0]))
        case b"ended":
            return TurnEnded(turn(rest[0]))
        case b"busy":
            return TurnInProgress(text(rest[0]))
        case b"tombstoned":
            return TurnTombstoned()
        case b"unknown":
            return TurnUnknown()
        case b"schema":
            raise StoreCorrupt(
                f"a record needs a reader of schema {text(rest[0])}: upgrade this process"
            )
    return None


def unexpected(found: object) -> StoreCorrupt:
    """To raise when a script answers with what its caller does not know."""
    return StoreCorrupt(f"unexpected answer of a script: {found!r}")


def session(reply: Sequence[Reply]) -> Session:
    """From [store's time in ms, values of SESSION_FIELDS]."""
    now_ms = number(reply[0])
    f = dict(zip(SESSION_FIELDS, items(reply[1]), strict=True))
    try:
        epoch = Epoch(number(f["epoch"]), data(f["nonce"]))
        return Session(
            session_id=_session_id(text(f["id"])),
            tenant=text(f["tenant"]),
            model=text(f["model"]),
            state=SessionState(text(f["state"])),
            owner=Owner(replica_ref(f["owner"], f["owner_inc"]), epoch) if f["owner"] else None,
            epoch=epoch,
            head=Position(number(f["length"]), data(f["digest"])),
            turn_index=number(f["turn_index"]),
            active_turn_id=text(f["active"]) or None,
            segments=_segments(text(f["segments"])),
            own_base=number(f["own_base"]),
            preamble=data(f["preamble"]),
            leading_digest=data(f["leading"]),
            token_fingerprint=data(f["fingerprint"]),
            labels=decode_labels(data(f["labels"])),
            parent_id=text(f["parent"]) or None,
            migration=_migration(f, now_ms),
            created_at_ms=number(f["created"]),
            updated_at_ms=number(f["updated"]),
            previous_owner=replica_ref(f["prev"], f["prev_inc"]) if f["prev"] else None,
            version=number(f["version"]),
            turn_ended_at_ms=number(f["turn_ended"] or 0),
        )
    except (ValueError, TypeError, StoreCorrupt) as error:
        raise StoreCorrupt(f"session {f['id']!r} cannot be read: {error}") from error


def turn(reply: Reply) -> Turn:
    """From the values of TURN_FIELDS."""
    f = dict(zip(TURN_FIELDS, items(reply), strict=True))
    try:
        status = TurnStatus(text(f["status"]))
        return Turn(
            spec=TurnSpec(
                text(f["id"]), data(f["input_digest"]), data(f["body"]), number(f["timeout"])
            ),
            index=number(f["index"]),
            status=status,
            attempt=number(f["attempt"]),
            input_start=number(f["input_start"]),
            output_start=Position(number(f["start_len"]), data(f["start_digest"])),
            output_end=Position(number(f["end_len"]), data(f["end_digest"])),
            deadline_at_ms=number(f["deadline"]),
            result=_result(f, status) if status.ended else None,
            attempt_replica=replica_ref(f["replica"], f["replica_inc"]) if f["replica"] else None,
        )
    except (ValueError, TypeError, StoreCorrupt) as error:
        raise StoreCorrupt(f"turn {f['id']!r} cannot be read: {error}") from error


def optional_turn(reply: Reply) -> Turn | None:
    """The same, or None for a turn that is not there."""
    return None if reply is None else turn(reply)


def turn_args(turn: Turn) -> list[Arg]:
    """The values of TURN_FIELDS, to write a turn as it is."""
    replica, result = turn.attempt_replica, turn.result
    values: dict[str, Arg] = {
        "id": turn.spec.turn_id,
        "index": turn.index,
        "input_digest": turn.spec.input_digest,
        "body": turn.spec.body,
        "timeout": turn.spec.timeout_ms,
        "deadline": turn.deadline_at_ms,
        "status": turn.status.value,
        "attempt": turn.attempt,
        "input_start": turn.input_start,
        "start_len": turn.output_start.length,
        "start_digest": turn.output_start.digest,
        "end_len": turn.output_end.length,
        "end_digest": turn.output_end.digest,
        "replica": replica.replica_id if replica else "",
        "replica_inc": replica.incarnation if replica else 0,
        "reason": result.reason.value if result else "",
        "text_end": result.text_end if result else 0,
        "usage": result.usage if result else b"",
        "error": result.error if result else "",
    }
    return [values[name] for name in TURN_FIELDS]


def replica_record(reply: Reply) -> ReplicaRecord:
    """From one item of the fleet script's answer."""
    values = items(reply)
    if len(values) != 7:
        raise unexpected(reply)
    replica_id, incarnation, details, beat, load, draining, gone = values
    return ReplicaRecord(
        ref=replica_ref(replica_id, incarnation),
        details=text(details),
        heartbeat=number(beat),
        load=text(load),
        draining=draining == b"1",
        gone=gone == b"1",
    )


def encode_labels(labels: tuple[tuple[str, str], ...]) -> bytes:
    """Labels as the store keeps them: a JSON list of pairs."""
    return json.dumps(labels, ensure_ascii=False, separators=(",", ":")).encode()


def decode_labels(packed: bytes) -> tuple[tuple[str, str], ...]:
    """Inverse of encode_labels."""
    return tuple((str(name), str(value)) for name, value in json.loads(packed))


def items(reply: Reply) -> list[Reply]:
    """A reply that has to be a list."""
    if not isinstance(reply, list):
        raise unexpected(reply)
    return reply


def data(value: Reply) -> bytes:
    """A field as bytes; absent is empty."""
    if value is None:
        return b""
    if not isinstance(value, bytes):
        raise unexpected(value)
    return value


def text(value: Reply) -> str:
    """A field as text; absent is empty."""
    try:
        return data(value).decode()
    except UnicodeDecodeError as error:
        raise StoreCorrupt(f"{value!r} is no text") from error


def number(value: Reply) -> int:
    """A decimal field, or an integer reply."""
    try:
        return value if isinstance(value, int) else int(data(value))
    except ValueError as error:
        raise StoreCorrupt(f"{value!r} is no number") from error


def tokens(value: Reply) -> list[int]:
    """A piece of a ledger."""
    try:
        return unpack_tokens(data(value))
    except ValueError as error:
        raise StoreCorrupt(f"a ledger cannot be read: {error}") from error


def replica_ref(replica_id: Reply, incarnation: Reply) -> ReplicaRef:
    """From its two values."""
    return ReplicaRef(text(replica_id), number(incarnation))


def _segments(packed: str) -> tuple[Segment, ...]:
    parts = (part.split(":") for part in packed.split(",") if part)
    return tuple(Segment(_session_id(ancestor), *map(int, bounds)) for ancestor, *bounds in parts)


def _session_id(found: str) -> str:
    family_of(found)  # raises ValueError
    return found


def _migration(f: dict[str, Reply], now_ms: int) -> Migration | None:
    if not f["mig"] or number(f["mig_until"]) <= now_ms:
        return None
    target = replica_ref(f["mig_target"], f["mig_inc"])
    return Migration(text(f["mig"]), target, number(f["mig_until"]))


def _result(f: dict[str, Reply], status: TurnStatus) -> TurnResult:
    return TurnResult(
        status=status,
        reason=FinishReason(text(f["reason"])),
        text_end=number(f["text_end"] or 0),
        usage=data(f["usage"]),
        error=text(f["error"]),
    )
