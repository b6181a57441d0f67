"""Sessions in the states that a call can find them in, and what must be true of them afterwards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import Message
from sessile.v1 import fleet_pb2, replica_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from statestore.records import Session, SessionState
from tests.support.served_world import STRANGER, TENANT, Served, finished, turn_request
from tests.support.wire import Answer

BUSY_TURN = "running"
MODEL = "sim"


@dataclass
class Case:
    """A session, who calls about it, and what it was before the call."""

    served: Served
    session_id: str
    tenant: str = TENANT
    before: Session | None = None
    stopped: bool = field(default=False)

    @property
    def session(self) -> Session:
        assert self.before is not None
        return self.before

    def ref(self) -> pb.ReplicaRef:
        """The replica whose API is called."""
        replica = self.served.world.replicas["a"]
        assert replica.ref is not None
        return pb.ReplicaRef(replica_id=replica.ref.replica_id, incarnation=replica.ref.incarnation)

    def other(self) -> pb.ReplicaRef:
        """Its peer."""
        replica = self.served.world.replicas["b"]
        assert replica.ref is not None
        return pb.ReplicaRef(replica_id=replica.ref.replica_id, incarnation=replica.ref.incarnation)

    def epoch(self) -> pb.Epoch:
        if self.before is None:
            return pb.Epoch(number=1, nonce=b"12345678")
        return pb.Epoch(number=self.before.epoch.number, nonce=self.before.epoch.nonce)

    def head(self) -> pb.Position:
        if self.before is None:
            return pb.Position(length=8, digest=b"0" * 16)
        return pb.Position(length=self.before.head.length, digest=self.before.head.digest)


Arrange = Callable[[Served, str], Awaitable[Case]]
"""Makes a session under this request id, in the state."""


async def idle(served: Served, name: str) -> Case:
    """On replica a, with a turn behind it."""
    session_id = await served.open(name, model=MODEL)
    session = await served.session(session_id)
    assert session is not None
    a = served.world.replicas["a"]
    assert a.ref is not None
    await served.world.store.place(session_id, session.epoch, a.ref, name.encode()[-8:])
    answer = await served.turn(session_id, "first")
    assert finished(answer).status == pb.TURN_STATUS_COMMITTED, answer
    return Case(served, session_id)


async def unplaced(served: Served, name: str) -> Case:
    return Case(served, await served.open(name, model=MODEL))


async def unknown(served: Served, name: str) -> Case:
    return Case(served, "ses_" + name.encode().hex().ljust(24, "0")[:24])


async def malformed(served: Served, name: str) -> Case:
    return Case(served, f"../{name}\r\n")


async def foreign(served: Served, name: str) -> Case:
    case = await idle(served, name)
    case.tenant = STRANGER
    return case


async def suspended(served: Served, name: str) -> Case:
    case = await idle(served, name)
    await _done(
        served, "SuspendSession", session_pb2.SuspendSessionRequest(session_id=case.session_id)
    )
    return case


async def closed(served: Served, name: str) -> Case:
    case = await idle(served, name)
    await _done(served, "CloseSession", session_pb2.CloseSessionRequest(session_id=case.session_id))
    return case


async def purged(served: Served, name: str) -> Case:
    case = await idle(served, name)
    request = session_pb2.CloseSessionRequest(session_id=case.session_id, purge=True)
    await _done(served, "CloseSession", request)
    return case


async def busy(served: Served, name: str) -> Case:
    """A long turn runs, and nobody listens to it."""
    case = await idle(served, name)
    request = turn_request(case.session_id, BUSY_TURN, max_tokens=400, ignore_eos=True)
    answer = await served.call("RunTurn", request, patience_s=0.5)
    assert answer.left, answer
    return case


async def _done(served: Served, method: str, request: Message) -> None:
    (await served.call(method, request)).check()


STATES: Mapping[str, Arrange] = {
    "idle": idle, "unplaced": unplaced, "unknown": unknown, "malformed": malformed,
    "foreign": foreign, "suspended": suspended, "closed": closed, "purged": purged, "busy": busy,
}  # fmt: skip


Build = Callable[[Case], Message]

ABOUT: Mapping[str, Build] = {
    "GetSession": lambda c: session_pb2.GetSessionRequest(session_id=c.session_id),
    "RunTurn": lambda c: turn_request(c.session_id, "second"),
    "CancelTurn": lambda c: session_pb2.CancelTurnRequest(
        session_id=c.session_id, turn_id=BUSY_TURN
    ),
    "ForkSession": lambda c: session_pb2.ForkSessionRequest(
        session_id=c.session_id, request_id=f"fork {c.session_id}"[:128]
    ),
    "SuspendSession": lambda c: session_pb2.SuspendSessionRequest(session_id=c.session_id),
    "ResumeSession": lambda c: session_pb2.ResumeSessionRequest(session_id=c.session_id),
    "CloseSession": lambda c: session_pb2.CloseSessionRequest(session_id=c.session_id),
    "GetTranscript": lambda c: session_pb2.GetTranscriptRequest(session_id=c.session_id),
    "WatchSession": lambda c: session_pb2.WatchSessionRequest(session_id=c.session_id),
    "MigrateSession": lambda c: fleet_pb2.MigrateSessionRequest(
        session_id=c.session_id, target_replica_id="b"
    ),
    "DispatchTurn": lambda c: replica_pb2.DispatchTurnRequest(
        turn=turn_request(c.session_id, "second"),
        epoch=c.epoch(),
        replica=c.ref(),
        tenant=c.tenant,
    ),
    "StopTurn": lambda c: replica_pb2.StopTurnRequest(session_id=c.session_id, turn_id=BUSY_TURN),
    "HandOver": lambda c: replica_pb2.HandOverRequest(
        session_id=c.session_id, epoch=c.epoch(), migration_id="m", lease_ms=500
    ),
    "AbortHandOver": lambda c: replica_pb2.AbortHandOverRequest(
        session_id=c.session_id, migration_id="m"
    ),
    "ExportKv": lambda c: replica_pb2.ExportKvRequest(
        session_id=c.session_id,
        target=c.other(),
        kv_fingerprint=c.served.world.replicas["a"].engine.info.kv_fingerprint,
        block_hashes=[b"h" * 16],
        source=c.ref(),
    ),
    "ImportSession": lambda c: replica_pb2.ImportSessionRequest(
        session_id=c.session_id,
        migration_id="m",
        source_endpoint=c.served.world.replicas["b"].endpoint,
        source=c.other(),
        up_to=c.head(),
        lease_ms=500,
        tenant=c.tenant,
    ),
    "ReleaseSession": lambda c: replica_pb2.ReleaseSessionRequest(
        session_id=c.session_id, epoch=c.epoch()
    ),
    "ReadTurns": lambda c: replica_pb2.ReadTurnsRequest(
        request=session_pb2.GetTranscriptRequest(session_id=c.session_id), tenant=c.tenant
    ),
}  # fmt: skip
"""Method -> a call about a session that nothing is wrong with but the session's state."""


async def called(method: str, arrange: Arrange, served: Served, name: str) -> tuple[Case, Answer]:
    """The call, on a session in that state."""
    case = await arrange(served, name)
    case.before = await served.session(case.session_id)
    patience_s = 1.0 if method == "WatchSession" else 120.0
    answer = await served.call(method, ABOUT[method](case), case.tenant, patience_s=patience_s)
    return case, answer


async def check_usable(case: Case) -> None:
    """The session takes turns, after what its state asks for first; one that is gone for good
    keeps no other from doing so."""
    served, session_id = case.served, case.session_id
    session = await served.session(session_id)
    if session is None or session.state is SessionState.CLOSED:
        session_id = (await idle(served, f"instead of {session_id}"[-60:])).session_id
        session = await served.session(session_id)
        assert session is not None
    if session.active_turn_id is not None:
        cancel = session_pb2.CancelTurnRequest(
            session_id=session_id, turn_id=session.active_turn_id
        )
        await _done(served, "CancelTurn", cancel)
    if session.state is SessionState.SUSPENDED:
        await _done(
            served, "ResumeSession", session_pb2.ResumeSessionRequest(session_id=session_id)
        )
    answer = await served.turn(session_id, "afterwards")
    answer.check()
    assert finished(answer).status == pb.TURN_STATUS_COMMITTED, answer
