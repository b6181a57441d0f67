"""Records of the store to and from messages of the wire."""

from __future__ import annotations

from sessile.v1 import fleet_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core.fleet import Replica
from statestore.records import Epoch, Owner, Position, ReplicaRef, Session, SessionState, TurnStatus

SESSION_STATES = {
    SessionState.OPEN: session_pb2.SESSION_STATE_OPEN,
    SessionState.SUSPENDED: session_pb2.SESSION_STATE_SUSPENDED,
    SessionState.CLOSED: session_pb2.SESSION_STATE_CLOSED,
}
TURN_STATUSES = {
    TurnStatus.RUNNING: pb.TURN_STATUS_RUNNING,
    TurnStatus.INTERRUPTED: pb.TURN_STATUS_INTERRUPTED,
    TurnStatus.COMMITTED: pb.TURN_STATUS_COMMITTED,
    TurnStatus.CANCELLED: pb.TURN_STATUS_CANCELLED,
    TurnStatus.FAILED: pb.TURN_STATUS_FAILED,
}


def ref_to_pb(ref: ReplicaRef) -> pb.ReplicaRef:
    """A replica process."""
    return pb.ReplicaRef(replica_id=ref.replica_id, incarnation=ref.incarnation)


def epoch_to_pb(epoch: Epoch) -> pb.Epoch:
    """An epoch."""
    return pb.Epoch(number=epoch.number, nonce=epoch.nonce)


def position_to_pb(position: Position) -> pb.Position:
    """A place in a ledger."""
    return pb.Position(length=position.length, digest=position.digest)


def position_from_pb(position: pb.Position) -> Position:
    """Inverse of :func:`position_to_pb`."""
    return Position(position.length, position.digest)


def owner_to_pb(owner: Owner) -> pb.Owner:
    """Who may write a ledger."""
    return pb.Owner(replica=ref_to_pb(owner.replica), epoch=epoch_to_pb(owner.epoch))


def session_to_pb(session: Session) -> session_pb2.Session:
    """The public view of a session."""
    preamble = session_pb2.OpenSessionRequest.FromString(session.preamble)
    return session_pb2.Session(
        session_id=session.session_id,
        model=session.model,
        state=SESSION_STATES[session.state],
        owner=None if session.owner is None else owner_to_pb(session.owner),
        head=position_to_pb(session.head),
        turn_index=session.turn_index,
        active_turn_id=session.active_turn_id or "",
        parent_id=session.parent_id or "",
        labels=dict(session.labels),
        created_at_unix_ms=session.created_at_ms,
        updated_at_unix_ms=session.updated_at_ms,
        default_params=preamble.default_params if preamble.HasField("default_params") else None,
        migrating_to="" if session.migration is None else session.migration.target.replica_id,
        ledger_bytes=session.ledger_bytes,
    )


def replica_to_pb(replica: Replica) -> fleet_pb2.Replica:
    """The operator's view of a replica; its load as it reported it."""
    details, load = replica.details, replica.load
    return fleet_pb2.Replica(
        ref=ref_to_pb(replica.ref),
        model=details.model,
        endpoint=details.endpoint,
        state=fleet_pb2.ReplicaState.Value(f"REPLICA_STATE_{replica.state}"),
        engine=details.engine,
        token_fingerprint=bytes.fromhex(details.token_fingerprint),
        kv_fingerprint=bytes.fromhex(details.kv_fingerprint),
        page_size=details.page_size,
        capacity_pages=details.capacity_pages,
        max_context_tokens=details.max_context_tokens,
        site=details.site,
        hardware=details.hardware,
        protocol_min=details.protocol_min,
        protocol_max=details.protocol_max,
        load=fleet_pb2.ReplicaLoad(
            running_turns=load.running_turns,
            queued_turns=load.queued_turns,
            queued_prefill_tokens=load.queued_prefill_tokens,
            free_pages=load.free_pages,
            pinned_pages=load.pinned_pages,
            sessions=load.sessions,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_tokens_per_s=load.decode_tokens_per_s,
            max_running_turns=details.max_running_turns,
            max_queued_turns=details.max_queued_turns,
        ),
    )
