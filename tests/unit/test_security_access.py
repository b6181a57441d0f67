"""Who may call what, and where a process may listen and call."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc import aio
from sessile.v1 import fleet_pb2, replica_pb2, session_pb2, types_pb2

from gateway.app.admission import Gate
from gateway.app.ports import ReplicaLost
from gateway.config import GatewayConfig
from gateway.core.errors import NotFound, PermissionDenied, Unavailable
from gateway.rpc.replica_client import GrpcReplicaClients, translate
from gateway.rpc.serving import Serving, rpc_of
from gateway.security.access import RPCS, Caller, Role, permit
from gateway.security.audit import AuditLog
from gateway.security.config import GatewaySecurity, TlsConfig, WorkerSecurity, is_loopback
from gateway.security.tls import InsecureEndpoint, Tls, dialled
from tests.support.certificates import Authority, yesterday
from tests.support.wire import Answer, Wire
from workers.config import ReplicaSettings, WorkerConfig
from workers.rpc import GrpcPeers

SERVICES = [
    service
    for file in (session_pb2, fleet_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
]
METHODS = {method.full_name: method for service in SERVICES for method in service.methods}


def test_every_rpc_has_its_entry_and_no_other() -> None:
    assert set(RPCS) == set(METHODS), "say in gateway/security/access.py who may call a new RPC"


def test_agents_have_their_service_and_operators_both() -> None:
    agent, operator = Caller("t", Role.AGENT), Caller("t", Role.OPERATOR)
    for name in METHODS:
        permit(operator, name)
        if "FleetService" in name:
            with pytest.raises(PermissionDenied, match="agent"):
                permit(agent, name)
        else:
            permit(agent, name)


def test_changes_to_the_fleet_are_audited() -> None:
    read_only = {"ListReplicas", "WatchFleet"}
    fleet = {name for name in METHODS if "FleetService" in name}
    audited = {name for name, access in RPCS.items() if access.audited}
    assert audited == {name for name in fleet if name.rpartition(".")[2] not in read_only}


def test_requests_say_their_rpc() -> None:
    found = {method.input_type.full_name: method.full_name for method in METHODS.values()}
    assert len(found) == len(METHODS), "two RPCs take one request"
    assert rpc_of(types_pb2.RunTurnRequest) == "sessile.v1.SessionService.RunTurn"


@pytest.mark.parametrize("caller", [Caller("t", Role.AGENT), Caller("t", Role.OPERATOR)])
def test_an_rpc_without_an_entry_is_nobodys(caller: Caller) -> None:
    with pytest.raises(PermissionDenied, match="no entry"):
        permit(caller, rpc_of(replica_pb2.StopTurnRequest))


class Fixed:
    """Everybody is this caller."""

    def __init__(self, caller: Caller) -> None:
        self.who = caller
        self.generation = 0

    async def caller(self, metadata: Mapping[str, str]) -> Caller:
        del metadata
        return self.who


def served(caller: Caller, audit: AuditLog, *, failing: bool = False) -> Wire:
    wire = Wire()

    async def migrate(tenant: str, request: Any) -> Message:
        del tenant, request
        if failing:
            raise NotFound("no session", reason="SESSION_NOT_FOUND")
        return fleet_pb2.MigrateSessionResponse()

    async def drain(tenant: str, request: Any) -> AsyncGenerator[Message, None]:
        del tenant, request
        yield fleet_pb2.DrainReplicaResponse(done=True)

    async def get(tenant: str, request: Any) -> Message:
        del tenant, request
        return session_pb2.GetSessionResponse()

    gate = Gate("max_calls", 9, 1)
    serving = Serving(Fixed(caller), gate, gate, audit=audit)
    methods = {
        "Migrate": serving.unary(migrate, fleet_pb2.MigrateSessionRequest),
        "Drain": serving.streaming(drain, fleet_pb2.DrainReplicaRequest),
        "Get": serving.unary(get, session_pb2.GetSessionRequest),
        "Stop": serving.unary(get, replica_pb2.StopTurnRequest),
    }
    wire.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", methods),))
    return wire


def audited(file: Path) -> list[tuple[str, str, Any]]:
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [(e["action"].rpartition(".")[2], e["outcome"], e["target"]) for e in entries]


async def called(wire: Wire, method: str, request: Message) -> Answer:
    return await wire.call(f"/t/{method}", request.SerializeToString())


OPERATOR = Caller("ops", Role.OPERATOR, "sk-abc")


@pytest.mark.anyio
async def test_what_operators_do_is_written_before_and_after(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    move = fleet_pb2.MigrateSessionRequest(session_id="s" * 300, target_replica_id="r2")
    await called(served(OPERATOR, AuditLog(file)), "Migrate", move)
    failing = served(OPERATOR, AuditLog(file), failing=True)
    await called(failing, "Migrate", fleet_pb2.MigrateSessionRequest(session_id="s"))
    drain = fleet_pb2.DrainReplicaRequest(replica_id="r1")
    await called(served(OPERATOR, AuditLog(file)), "Drain", drain)
    read = session_pb2.GetSessionRequest(session_id="s")
    await called(served(OPERATOR, AuditLog(file)), "Get", read)
    acting = Caller("acme", Role.OPERATOR, "sk-abc", foreign=True)
    await called(served(acting, AuditLog(file)), "Get", read)
    long = {"session_id": "s" * 255 + "…", "target_replica_id": "r2"}
    assert audited(file) == [
        ("MigrateSession", "BEGUN", long),
        ("MigrateSession", "OK", long),
        ("MigrateSession", "BEGUN", {"session_id": "s"}),
        ("MigrateSession", "SESSION_NOT_FOUND", {"session_id": "s"}),
        ("DrainReplica", "BEGUN", {"replica_id": "r1"}),
        ("DrainReplica", "OK", {"replica_id": "r1"}),
        ("GetSession", "BEGUN", {"session_id": "s"}),
        ("GetSession", "OK", {"session_id": "s"}),
    ]
    assert os.stat(file).st_mode & 0o777 == 0o600


@pytest.mark.anyio
async def test_what_cannot_be_written_down_is_not_done(tmp_path: Path) -> None:
    wire = served(OPERATOR, AuditLog(tmp_path / "nowhere" / "audit"))
    answer = await called(wire, "Migrate", fleet_pb2.MigrateSessionRequest(session_id="s"))
    assert (answer.code, answer.responses) == (grpc.StatusCode.INTERNAL, [])
    assert "audit log" in answer.message
    with pytest.raises(OSError, match="nowhere"):
        AuditLog(tmp_path / "nowhere" / "audit").check()


@pytest.mark.anyio
async def test_an_rpc_that_is_not_for_the_caller_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    wire = served(Caller("acme", Role.AGENT, "sk-x"), AuditLog(file))
    for method, request in (
        ("Migrate", fleet_pb2.MigrateSessionRequest(session_id="s")),
        ("Drain", fleet_pb2.DrainReplicaRequest(replica_id="r1")),
        ("Stop", replica_pb2.StopTurnRequest()),
    ):
        answer = await called(wire, method, request)
        assert answer.code is grpc.StatusCode.PERMISSION_DENIED
        assert answer.reason == "PERMISSION_DENIED"
        assert answer.hint
        assert answer.responses == []
    assert not file.exists()


# -- where

FILES = TlsConfig(Path("c"), Path("k"), Path("ca"))
KEYS = Path("keys")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
        ("gateway", False),
        ("localhost.example.com", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    if not loopback:
        with pytest.raises(ValueError, match=r"TLS and authentication.*--tls-certificate.*--insec"):
            GatewayConfig(listen=f"{host}:1")
        with pytest.raises(ValueError, match="there is no authentication"):
            GatewayConfig(listen=f"{host}:1", security=GatewaySecurity(FILES))
        with pytest.raises(ValueError, match="there is no TLS"):
            GatewayConfig(listen=f"{host}:1", security=GatewaySecurity(api_keys=KEYS))
    for security in (
        GatewaySecurity(FILES, api_keys=KEYS),
        GatewaySecurity(allow_insecure=True),
        *[GatewaySecurity()] * loopback,
    ):
        assert GatewayConfig(listen=f"{host}:1", security=security)


@pytest.mark.parametrize("setting", ["listen", "kv_listen"])
def test_a_worker_off_loopback_needs_tls(setting: str) -> None:
    def config(security: WorkerSecurity) -> WorkerConfig:
        where: dict[str, Any] = {setting: "10.0.0.1:1"}
        return WorkerConfig("redis://x", ReplicaSettings("r"), security=security, **where)

    with pytest.raises(ValueError, match=rf"{setting} 10\.0\.0\.1.*--tls-ca.*--insecure"):
        config(WorkerSecurity())
    assert config(WorkerSecurity(allow_insecure=True))
    assert config(WorkerSecurity(FILES))
    with pytest.raises(ValueError, match="needs ca"):
        WorkerSecurity(TlsConfig(Path("c"), Path("k")))


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="ca"):
        TlsConfig(Path("c"), Path("k"), require_client_certificate=True)
    with pytest.raises(ValueError, match="ca"):
        GatewaySecurity(parts=TlsConfig(Path("c"), Path("k")))
    public = GatewaySecurity(TlsConfig(Path("c"), Path("k")))
    assert public.towards_replicas is None, "without a ca nobody could be believed"
    assert GatewaySecurity(public.tls, FILES).towards_replicas is FILES


def test_how_endpoints_are_called(tmp_path: Path) -> None:
    tls = Authority(tmp_path / "pki").tls("part")
    assert dialled("tls://10.0.0.1:1", tls, allow_insecure=False) == ("10.0.0.1:1", tls)
    assert dialled("127.0.0.1:1", tls, allow_insecure=False) == ("127.0.0.1:1", None)
    assert dialled("10.0.0.1:1", None, allow_insecure=True) == ("10.0.0.1:1", None)
    for own in (tls, None):
        with pytest.raises(InsecureEndpoint, match="does not speak TLS"):
            dialled("10.0.0.1:1", own, allow_insecure=False)
    with pytest.raises(InsecureEndpoint, match="has no certificate"):
        dialled("tls://10.0.0.1:1", None, allow_insecure=True)


@pytest.mark.anyio
async def test_a_replica_that_must_not_be_called_is_not_taken_for_gone() -> None:
    clients = GrpcReplicaClients(GatewayConfig())
    clients.warm("10.0.0.1:1", 1)
    replica = clients.at("10.0.0.1:1")
    with pytest.raises(ReplicaLost, match="does not speak TLS") as lost:
        await replica.stop_turn(replica_pb2.StopTurnRequest(), 1.0)
    assert not lost.value.refused
    with pytest.raises(ReplicaLost, match="does not speak TLS"):
        await anext(replica.dispatch_turn(replica_pb2.DispatchTurnRequest(), 1.0))
    await clients.aclose()
    with pytest.raises(Unavailable, match="has no certificate"):
        await GrpcPeers().export_kv("tls://127.0.0.1:1", replica_pb2.ExportKvRequest(), 1.0)


@pytest.mark.parametrize(
    ("details", "tls", "gone"),
    [
        ("failed to connect to all addresses; last error: ipv4:1.2.3.4:1: Socket closed", True, 0),
        ("failed to connect to all addresses; last error: Connection reset by peer", True, 0),
        ("failed to connect to all addresses; last error: Connection refused", True, 1),
        ("Socket closed", True, 1),
        ("recvmsg:Connection reset by peer", True, 1),
        ("failed to connect to all addresses; last error: Connection reset by peer", False, 1),
    ],
)
def test_a_refused_certificate_is_no_sign_of_a_dead_process(
    details: str, tls: bool, gone: int
) -> None:
    error = aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata(), details)
    lost = translate(error, tls=tls)
    assert isinstance(lost, ReplicaLost)
    assert lost.refused is bool(gone)


# -- certificates


def test_files_that_cannot_be_used_are_refused_at_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki")
    good, other = authority.issue("good"), authority.issue("other")
    with pytest.raises(ValueError, match="expired at"):
        Tls(authority.issue("late", expires=yesterday()))
    with pytest.raises(ValueError, match="no certificate and its key"):
        Tls(TlsConfig(good.certificate, other.key, good.ca))
    with pytest.raises(ValueError, match="holds no certificates"):
        Tls(TlsConfig(good.certificate, good.key, good.key))
    with pytest.raises(FileNotFoundError):
        Tls(TlsConfig(tmp_path / "none", good.key))


def test_files_are_read_again_only_when_they_can_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path / "pki")
    tls = authority.tls("part")
    first = tls.serving()
    assert tls.serving() is first
    old_key = tls.config.key.read_bytes()
    authority.issue("part")
    new_key = tls.config.key.read_bytes()
    tls.config.key.write_bytes(old_key)  # the certificate came, its key has not yet
    assert tls.serving() is first
    assert caplog.text.count("what it was stays in use") == 1
    tls.config.key.write_bytes(new_key)
    assert tls.serving() is not first
    assert tls.generation == 1
    authority.issue("part", expires=yesterday())
    assert tls.generation == 1
    assert "expired" in caplog.text
    tls.config.certificate.unlink()
    assert tls.generation == 1
