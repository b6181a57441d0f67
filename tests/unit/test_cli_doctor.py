"""``sessile doctor``: what it finds, on a real store, real ports and real certificates."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest
import redis
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.testing import CliRunner, Result

from gateway.cli import doctor
from gateway.cli.doctor_host import (
    CertificateFiles,
    check_certificate,
    check_directory,
    check_file,
    check_model,
    check_model_folder,
    check_open_files,
    check_port,
    check_shared_memory,
)
from gateway.cli.doctor_store import check_fleet, clock_finding, judged
from gateway.cli.findings import Finding, Level
from gateway.cli.main import app
from gateway.config import GatewayConfig
from gateway.security.config import GatewaySecurity
from statestore.records import ReplicaRecord, ReplicaRef, ReplicaRegistration
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from statestore.replica_info import ReplicaDetails
from tests.support.certificates import Authority, yesterday
from tests.support.servers import NO_RETRY, free_port, running_server, valkey_binary
from tests.support.tokenizers import template, write_model_folder

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL
NOW = datetime.now(UTC)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
GOOD = {"redis_version": "7.2.0", "role": "master", "aof_enabled": 1, "connected_slaves": 0}


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with running_server(valkey_binary(), "--appendonly", "yes") as url:
        yield url


@contextmanager
def process(
    ready: Any = SERVING, credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    """Something with the health service of a gateway or a worker; gives its address."""
    servicer = health.HealthServicer()
    servicer.set("", ready)
    servicer.set("liveness", SERVING)
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def run(*arguments: str, timeout_s: float = 20) -> Result:
    """So long for whom is slow today; only one that will not answer is worth a shorter time."""
    return CliRunner().invoke(app, ["doctor", "--timeout", str(timeout_s), *arguments])


def found(*arguments: str, timeout_s: float = 20) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and findings by what was checked; the worst of several."""
    result = run("--json", *arguments, timeout_s=timeout_s)
    answer = json.loads(result.stdout)
    order = [level.value for level in Level]
    findings: list[dict[str, str]] = answer["findings"]
    assert answer["failed"] == sum(it["level"] == "fail" for it in findings)
    assert all(it["fix"] for it in findings if it["level"] != "ok")
    findings.sort(key=lambda it: order.index(it["level"]))
    return result.exit_code, {it["check"]: it for it in findings}


def details(endpoint: str, **changes: Any) -> ReplicaDetails:
    fields: dict[str, Any] = {
        "endpoint": endpoint, "model": "m", "engine": "sim", "token_fingerprint": "00",
        "kv_fingerprint": "00", "page_size": 16, "capacity_pages": 8, "max_context_tokens": 99,
        "max_running_turns": 1, "max_queued_turns": 1,
    }  # fmt: skip
    return ReplicaDetails(**(fields | changes))


async def register(url: str, draining: str = "", **endpoints: str) -> None:
    """``draining``: the one of them that is."""
    store = RedisStore(await connect(url))
    for name, endpoint in endpoints.items():
        registration = ReplicaRegistration(name, details(endpoint).to_json())
        ref = await store.register_replica(registration)
        if name == draining:
            await store.set_draining(ref, True)
    await store.aclose()


def test_a_fleet_that_works_and_then_lacks_a_replica(store: str) -> None:
    redis.Redis(unix_socket_path=store.removeprefix("unix://"), retry=NO_RETRY).flushall()
    settings = ("--set", f"redis_url={store}", "--set", "listen=127.0.0.1:0")
    with process() as alive, process(NOT_SERVING) as waiting:
        anyio.run(lambda: register(store, a=alive))
        code, checks = found(*settings)
        assert code == 0, checks
        assert {it["level"] for it in checks.values()} <= {"ok", "warn"}
        for check in ("store", "store version", "store eviction", "store durability", "clock"):
            assert checks[check]["level"] == "ok", checks[check]
        for check in ("store writes", "store scripts", "replica a", "port gateway.listen"):
            assert checks[check]["level"] == "ok", checks[check]
        gone = f"127.0.0.1:{free_port()}"
        anyio.run(lambda: register(store, b=waiting, c=gone, d=waiting, draining="d"))
        code, checks = found(*settings, "--process", "gateway")
        assert code == 1
        assert "NOT_SERVING" in checks["replica b"]["detail"]
        assert "does not answer" in checks["replica c"]["detail"]
        levels = [checks[f"replica {name}"]["level"] for name in "bcd"]
        assert levels == ["fail", "fail", "warn"], "one that ends is not ready"
        shown = run(*settings, "--process", "gateway")
    assert shown.exit_code == 1
    assert "replica c" in shown.stdout
    assert "advertise_host" in shown.stdout


@pytest.mark.parametrize(
    ("rules", "check", "words"),
    [
        (["+@all", "~*"], "store", "refuses the credentials"),
        (["+ping", "+select", "~*"], "store", "lacks a permission"),
        (["+ping", "+select", "+info", "+time", "~*"], "store writes", "lacks a permission"),
        (["+@all", "-evalsha", "-eval", "~*"], "store", "lacks a permission"),
    ],
    ids=["password", "info", "writes", "scripts"],
)
def test_what_the_stores_user_may_not_do_is_said(
    store: str, rules: list[str], check: str, words: str
) -> None:
    client: Any = redis.Redis(unix_socket_path=store.removeprefix("unix://"), retry=NO_RETRY)
    client.execute_command("ACL", "SETUSER", "u", "reset", "on", ">right", *rules)
    password = "wrong" if words == "refuses the credentials" else "right"
    url = store.replace("unix://", f"unix://u:{password}@")
    code, checks = found("--process", "worker", "--set", f"redis_url={url}")
    assert code == 1
    assert words in checks[check]["detail"]
    assert password not in json.dumps(checks)


def test_a_store_that_is_not_there() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    code, checks = found("--set", f"redis_url={url}", "--set", "listen=127.0.0.1:0")
    assert code == 1
    assert url in checks["store"]["detail"]
    assert "redis_url" in checks["store"]["fix"]


def test_a_cluster_is_looked_at_node_by_node_and_is_no_single_server(cluster_url: str) -> None:
    own = ("--process", "worker", "--set")
    code, checks = found(*own, f"redis_url={cluster_url}")
    assert code == 0, checks
    nodes = cluster_url.removeprefix("redis+cluster://").split(",")
    assert all(checks[f"store version {node}"]["level"] == "ok" for node in nodes)
    assert checks["store scripts"]["level"] == "ok"
    code, checks = found(*own, f"redis_url=redis://{nodes[0]}")
    assert [name for name, it in checks.items() if it["level"] == "fail"] == ["store kind"]


def test_without_a_store_a_gateway_starts_one_and_a_worker_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SESSILE_REDIS", raising=False)
    code, checks = found("--process", "gateway", "--set", "listen=127.0.0.1:0")
    assert (code, checks["store"]["level"]) == (0, "ok")
    code, checks = found("--process", "worker")
    assert (code, checks["store"]["level"]) == (1, "fail")


def test_settings_that_are_refused_do_not_hide_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "sessile.toml"
    file.write_text('[gateway]\nlisten = "127.0.0.1:0"\n[worker]\nshutdown_grace_s = -1\n')
    code, checks = found("--config", str(file))
    assert code == 1
    assert "shutdown_grace_s" in checks["settings worker"]["detail"]
    assert checks["port gateway.listen"]["level"] == "ok"
    file.write_text("[nonsense]\nx = 1\n")  # which every process refuses; it is told once
    answer = json.loads(run("--json", "--config", str(file)).stdout)
    assert (answer["failed"], len(answer["findings"])) == (1, 1)


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        ({"redis_version": "6.2.1"}, "store version", FAIL),
        ({"maxmemory_policy": "allkeys-lru"}, "store eviction", FAIL),
        ({"aof_enabled": 0}, "store durability", WARN),
        ({"aof_enabled": 0, "connected_slaves": 1}, "store durability", OK),
        ({"aof_last_write_status": "err"}, "store durability", FAIL),
        ({"redis_mode": "sentinel"}, "store kind", FAIL),
        ({"cluster_enabled": 1}, "store kind", FAIL),
        ({"role": "slave"}, "store role", FAIL),
    ],
    ids=str,
)
def test_what_info_says(change: dict[str, Any], check: str, level: Level) -> None:
    told = {it.check: it for it in judged(GOOD | change, "server", 0)}
    assert told[check].level is level
    assert bool(told[check].fix) is (level is not OK)


def test_info_of_a_good_server_and_of_one_with_too_few_replicas() -> None:
    assert {it.level for it in judged(GOOD, "server", 0)} == {OK}
    assert [it.check for it in judged(GOOD, "server", 1) if it.level is FAIL] == [
        "store durability"
    ]
    assert "no Cluster" in next(iter(judged(GOOD, "cluster", 0))).detail


@pytest.mark.parametrize(
    ("offset", "uncertainty", "level"),
    [(0.1, 0.0, OK), (-2.0, 0.1, WARN), (2.0, 1.5, OK), (45.0, 0.1, FAIL), (-45.0, 0.1, FAIL)],
)
def test_the_clock(offset: float, uncertainty: float, level: Level) -> None:
    assert clock_finding(offset, uncertainty).level is level


async def judge(record: ReplicaRecord, answer: str = "") -> Finding:
    (finding,) = await check_fleet((record,), lambda endpoint: answer)
    return finding


@pytest.mark.anyio
async def test_replicas_that_cannot_be_used() -> None:
    def record(text: str, *, gone: bool = False) -> ReplicaRecord:
        return ReplicaRecord(ReplicaRef("r", 1), text, 1, "", False, gone)

    good = details("127.0.0.1:1")
    assert (await judge(record(good.to_json()))).level is OK
    assert (await judge(record(good.to_json()), "it is away")).level is FAIL
    assert "cannot be read" in (await judge(record("nonsense"))).detail
    newer = details("127.0.0.1:1", protocol_min=90, protocol_max=91)
    assert "90 to 91" in (await judge(record(newer.to_json()))).detail
    assert (await judge(record(good.to_json(), gone=True))).detail == "no replica is registered"


def test_a_replica_is_called_with_the_gateways_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    credentials = authority.tls("worker").server_credentials(require_client_certificate=True)
    with process(credentials=credentials) as address:
        own = GatewayConfig(security=GatewaySecurity(tls=authority.issue("gateway")))
        assert doctor._replica(own, 20.0, f"tls://{address}") == ""
        assert "TLS" in doctor._replica(GatewayConfig(), 20.0, f"tls://{address}")
        other = Authority(tmp_path / "other").issue("gateway", ca=authority.certificate)
        stranger = GatewayConfig(security=GatewaySecurity(tls=other))
        assert "does not answer" in doctor._replica(stranger, 1.0, f"tls://{address}")


def certificate(config: Any, unchained: Level = FAIL) -> Finding:
    return check_certificate(
        CertificateFiles(
            "worker.security.tls", config.certificate, config.key, config.ca, unchained
        ),
        NOW,
    )


def test_certificates_and_their_times(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    far, near = (NOW + timedelta(days=days) for days in (15, 13))
    assert certificate(authority.issue("far", expires=far)).level is OK
    soon = certificate(authority.issue("near", expires=near))
    assert (soon.level, f"{near:%Y-%m-%d}" in soon.detail) == (WARN, True)
    late = certificate(authority.issue("late", expires=yesterday()))
    assert (late.level, "expired" in late.detail) == (FAIL, True)


def test_certificates_that_do_not_fit(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, two = authority.issue("one"), authority.issue("two")
    one.key.write_bytes(two.key.read_bytes())
    assert "is not the key of" in certificate(one).detail
    stranger = Authority(tmp_path / "other").issue("s", ca=authority.certificate)
    assert [certificate(stranger, level).level for level in Level] == [OK, WARN, FAIL]
    two.certificate.write_text("nonsense")
    assert "holds no certificate" in certificate(two).detail
    two.certificate.unlink()
    assert certificate(two).level is FAIL


def test_a_chain_with_an_intermediate_certificate(tmp_path: Path) -> None:
    root = trustme.CA()
    issued = root.create_child_ca().issue_cert("localhost")
    ca, path, key = tmp_path / "ca.pem", tmp_path / "c.pem", tmp_path / "k.pem"
    root.cert_pem.write_to_path(ca)
    issued.private_key_pem.write_to_path(key)
    path.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    files = CertificateFiles("worker.security.tls", path, key, ca, FAIL)
    assert check_certificate(files, NOW).level is OK
    path.write_bytes(issued.cert_chain_pems[0].bytes())
    assert check_certificate(files, NOW).level is FAIL


def test_ports() -> None:
    assert check_port("p", f"127.0.0.1:{free_port()}", lambda _: False).level is OK
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        taken = check_port("p", address, lambda _: False)
        assert (taken.level, "something else" in taken.detail) == (FAIL, True)
        assert check_port("p", address, lambda _: None).level is WARN
        assert check_port("p", address, lambda _: False, running=True).level is OK
        everywhere = f"0.0.0.0:{other.getsockname()[1]}"
        assert check_port("p", everywhere, lambda asked: asked == address).level is OK
    assert "no address of this machine" in check_port("p", "192.0.2.1:9", lambda _: None).detail
    assert "is no host" in check_port("p", "no.such.invalid:9", lambda _: None).detail


def test_a_port_where_a_sessile_process_listens_is_told_from_others() -> None:
    with process() as address:
        _, checks = found("--process", "gateway", "--set", f"listen={address}")
        assert "a Sessile process answers" in checks["port gateway.listen"]["detail"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        setting = f"listen={address}"
        code, checks = found("--process", "gateway", "--set", setting, timeout_s=1)
        assert (code, checks["port gateway.listen"]["level"]) == (1, "fail")


def model(folder: Path) -> Path:
    folder.mkdir()
    write_model_folder(folder, template("chatml"))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_models_folder(tmp_path: Path) -> None:
    whole = check_model_folder(model(tmp_path / "whole"))
    assert whole.level is OK, whole
    for file in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        folder = model(tmp_path / file)
        (folder / file).unlink()
        assert check_model_folder(folder).level is FAIL, file
    sharded = model(tmp_path / "sharded")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 1 of 2" in check_model_folder(sharded).detail
    (sharded / "model.safetensors.index.json").write_text("[]")
    assert check_model_folder(sharded).level is FAIL


def test_an_engines_options_and_model(tmp_path: Path) -> None:
    (wrong,) = check_model("torch", {"threads": "many"}, None)
    assert (wrong.level, "threads" in wrong.detail) == (FAIL, True)
    *_, absent = check_model("torch", {}, tmp_path / "bundled")
    assert (absent.level, absent.check) == (WARN, "model")
    *_, given = check_model("sglang", {"model": str(model(tmp_path / "m"))}, None)
    assert given.level is OK


def test_limits_of_the_system(tmp_path: Path) -> None:
    limits = [(-1, -1), (4096, 4096), (1024, 4096), (100, 4096)]
    assert [check_open_files("g", 4096, it).level for it in limits] == [OK, OK, WARN, FAIL]
    assert "hard limit is 2048" in check_open_files("g", 4096, (1024, 2048)).fix
    assert check_shared_memory(1 << 40, tmp_path).level is FAIL
    assert check_shared_memory(None, tmp_path / "none").level is FAIL
    assert check_file("f", tmp_path / "none").level is FAIL
    assert check_directory("d", tmp_path / "new" / "data").level is OK
    (tmp_path / "file").touch()
    assert check_directory("d", tmp_path / "file" / "data").level is FAIL


def test_the_command_line_starts_without_what_the_checks_import() -> None:
    code = "import sys, gateway.cli.main; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(shown.stdout.split())
    assert "gateway.cli.doctor" in loaded
    assert not loaded & {"torch", "tokenizers", "transformers", "redis", "cryptography"}
