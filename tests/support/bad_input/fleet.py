"""Bad input of operators, and of gateways and peers to a replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message
from sessile.v1 import fleet_pb2, replica_pb2
from sessile.v1 import types_pb2 as pb

from tests.support.bad_input.rows import (
    Code,
    always,
    beyond,
    changed,
    row,
)
from tests.support.served_world import turn_request
from tests.support.situations import ABOUT, Case


def moving(target: str, **fields: Any) -> Callable[[Case], Message]:
    return lambda c: fleet_pb2.MigrateSessionRequest(
        session_id=c.session_id, target_replica_id=target, **fields
    )


row(
    "MigrateSession",
    "to a replica nobody knows",
    moving("zz"),
    "List the replicas",
    Code.NOT_FOUND,
    "REPLICA_NOT_FOUND",
)
for target, told in {
    "a": "is where the session is",
    "d": "is DRAINING",
    "t": "another tokenizer",
    "m": "serves",
}.items():
    row(
        "MigrateSession",
        f"to one that {told}",
        moving(target),
        told,
        Code.FAILED_PRECONDITION,
        "MIGRATION_REFUSED",
    )
row(
    "MigrateSession",
    "for more than an hour",
    moving("b", timeout_ms=3_600_001),
    "timeout_ms is at most 3600000",
)
for replica_id in ("", "zz"):
    row(
        "DrainReplica",
        f"a replica called {replica_id!r}",
        always(fleet_pb2.DrainReplicaRequest(replica_id=replica_id)),
        "List the replicas",
        Code.NOT_FOUND,
        "REPLICA_NOT_FOUND",
    )
row(
    "DrainReplica",
    "for more than a day",
    lambda _: fleet_pb2.DrainReplicaRequest(replica_id="b", timeout_ms=86_400_001),
    "timeout_ms is at most 86400000",
)
row(
    "WatchFleet",
    "once in more than a minute",
    lambda _: fleet_pb2.WatchFleetRequest(interval_ms=60_001),
    "interval_ms is at most 60000",
)


STALE = pb.Epoch(number=1, nonce=b"12345678")


def elsewhere(method: str, field: str) -> Callable[[Case], Message]:
    """Meant for the process that had the replica's name before."""

    def build(case: Case) -> Message:
        request = ABOUT[method](case)
        getattr(request, field).incarnation -= 1
        return request

    return build


def dispatched(**turn: Any) -> Callable[[Case], Message]:
    def build(case: Case) -> Message:
        request = ABOUT["DispatchTurn"](case)
        request.MergeFrom(replica_pb2.DispatchTurnRequest(turn=pb.RunTurnRequest(**turn)))
        return request

    return build


def without(method: str, path: str) -> Callable[[Case], Message]:
    def build(case: Case) -> Message:
        request = ABOUT[method](case)
        part: Any = request
        *parents, last = path.split(".")
        for parent in parents:
            part = getattr(part, parent)
        part.ClearField(last)
        return request

    return build


NOT_OWNER = (Code.ABORTED, "NOT_OWNER")
row(
    "DispatchTurn",
    "another incarnation",
    elsewhere("DispatchTurn", "replica"),
    "call that replica",
    *NOT_OWNER,
)
row(
    "DispatchTurn",
    "a stale epoch",
    lambda c: replica_pb2.DispatchTurnRequest(
        turn=turn_request(c.session_id, "second"), epoch=STALE, replica=c.ref(), tenant=c.tenant
    ),
    "Read the session's owner",
    *NOT_OWNER,
)
row("DispatchTurn", "no turn id", without("DispatchTurn", "turn.turn_id"), "1 to 128 characters")
row(
    "DispatchTurn",
    "no session id",
    without("DispatchTurn", "turn.session_id"),
    "1 to 128 characters",
)
row(
    "DispatchTurn",
    "sampling nobody can do",
    dispatched(params=pb.SamplingParams(temperature=3.0)),
    "temperature must be within 0 and 2",
)
row(
    "DispatchTurn",
    "a priority of the future",
    dispatched(priority=99),
    "a turn is interactive (1) or batch (2)",
)
row(
    "HandOver",
    "a stale epoch",
    lambda c: replica_pb2.HandOverRequest(session_id=c.session_id, epoch=STALE, migration_id="m"),
    "another epoch",
    *NOT_OWNER,
)
row(
    "ExportKv",
    "another incarnation",
    elsewhere("ExportKv", "source"),
    "call that replica",
    *NOT_OWNER,
)
row(
    "ExportKv",
    "KV of another model",
    changed("ExportKv", kv_fingerprint=b"other"),
    "not exchangeable",
    Code.FAILED_PRECONDITION,
    "MIGRATION_REFUSED",
)
row(
    "ExportKv",
    "a hash that is none",
    changed("ExportKv", block_hashes=[b"short"]),
    "a block hash has 16 bytes",
)
row(
    "ImportSession",
    "no digest to verify by",
    without("ImportSession", "up_to.digest"),
    "up_to needs its digest",
)
row(
    "ImportSession",
    "past the end",
    lambda c: changed("ImportSession", up_to=beyond(c, 5, b"d" * 16))(c),
    "the ledger ends at",
    Code.FAILED_PRECONDITION,
    "MIGRATION_REFUSED",
)
