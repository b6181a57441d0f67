"""``sessile up``, ``gateway``, ``worker``: the processes, and a whole fleet in one command.

What runs a process is imported when it is run: the other commands start faster without.
"""

from __future__ import annotations

import enum
import os
import re
import secrets
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import anyio
import typer
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn

from gateway.cli.output import (
    DEFAULT_GATEWAY,
    JsonOption,
    console,
    print_json,
    reported_errors,
    tell,
)
from gateway.cli.sources import CONFIG_VARIABLE, SettingsRefused, Tree, from_flags
from gateway.telemetry.logs import log_to
from statestore.connection import redacted
from statestore.ports import StoreError
from statestore.process import Announce

if TYPE_CHECKING:
    from gateway.cli.launch import Child, Cluster

WATCH_INTERVAL_S = 0.2
DRAIN_GRACE_S = 20.0
"""Of a worker that is a process by itself, for the sessions it has when it is told to end."""
MADE_UP = "made up"
"""Origin of a setting that a command invents."""


class Engine(enum.StrEnum):
    """Engines a worker can host."""

    SIM = "sim"
    TORCH = "torch"
    SGLANG = "sglang"
    SGLANG_SERVER = "sglang-server"


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Settings in TOML. [default: the file SESSILE_CONFIG names]"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Any setting, as in times.fleet_poll_s=0.5; may be repeated. "
        "`sessile config show --defaults` lists them.",
    ),
]
RedisOption = Annotated[
    str | None,
    typer.Option(
        help="Store: redis://, rediss://, redis+cluster://, unix://. [environment: SESSILE_REDIS]"
    ),
]
StoreWaitOption = Annotated[
    float | None,
    typer.Option(
        min=0, help="Seconds to wait at the start for a store that is not there. [for ever]"
    ),
]
EngineOption = Annotated[
    Engine | None,
    typer.Option(
        help="torch: embedded; sglang: in the worker; sglang-server: one that runs elsewhere; "
        "sim: simulated, the default."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        help="A known name or a model's folder; sim: any name to serve under. Default: its own."
    ),
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option("--engine-option", metavar="NAME=VALUE", help="May be repeated."),
]
EngineArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[-- ARGUMENTS]",
        help="sglang: any arguments of its server, as in: -- --tp-size 2 --enable-metrics",
        show_default=False,
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data-directory",
        help="Keep the private store's data here; default: they end with this process.",
    ),
]


def _name(value: str) -> str:
    """A name that is one word in every log and on every command line."""
    if value and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", value) is None:
        raise typer.BadParameter("1 to 128 letters, digits, '_', '.' and '-', no other signs")
    return value


TlsCertificateOption = Annotated[
    Path | None,
    typer.Option("--tls-certificate", help="PEM; with --tls-key the listener speaks TLS."),
]
TlsKeyOption = Annotated[Path | None, typer.Option("--tls-key", help="Its private key, PEM.")]
TlsCaOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca", help="PEM of who signs for replicas and gateways, and for callers if they must."
    ),
]
InsecureOption = Annotated[
    bool | None,
    typer.Option(
        "--insecure", help="Off loopback too without TLS or authentication: a trusted network."
    ),
]
LogLevelOption = Annotated[
    str | None,
    typer.Option("--log-level", help="DEBUG to CRITICAL. [INFO; environment: SESSILE_LOG_LEVEL]"),
]


def up(
    engine_arguments: EngineArguments = None,
    engine: EngineOption = None,
    model: ModelOption = "",
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    gateways: Annotated[int, typer.Option(min=1)] = 1,
    listen: Annotated[
        str, typer.Option(help="host:port of the first gateway; the others take the next ports.")
    ] = DEFAULT_GATEWAY,
    redis: RedisOption = None,
    data_directory: DataOption = None,
    engine_option: EngineOptions = None,
    log_directory: Annotated[
        Path | None, typer.Option(help="Default: a new temporary one.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a fleet on this machine until Ctrl-C: a private store, gateways and workers.

    On a store given by --redis, its replicas have names of their own beside those of others."""
    from gateway.cli.launch import Cluster, LaunchFailed

    flags = from_flags(
        ("listen", "--listen", listen),
        ("redis_url", "--redis", redis),
        ("data_directory", "--data-directory", data_directory),
    )
    options = parse_options(engine_option, model, engine_arguments)
    own = loaded("gateway", config, flags)
    # The children have the store's URL from here: theirs is no private one, with data of its own.
    environment = {"SESSILE_GATEWAY__DATA_DIRECTORY": ""}
    if config is not None:
        environment[CONFIG_VARIABLE] = str(config.absolute())
    cluster = Cluster(
        engine=str(engine or ""),
        engine_options=dict(options),
        redis_url=own.redis_url,
        data_directory=own.data_directory,
        log_directory=log_directory,
        environment=environment,
    )
    with reported_errors(LaunchFailed, StoreError):
        anyio.run(_up, cluster, listen, gateways, replicas, as_json)


def gateway(
    redis: RedisOption = None,
    store_wait_s: StoreWaitOption = None,
    data_directory: DataOption = None,
    listen: Annotated[
        str | None, typer.Option(help=f"host:port; port 0 takes a free one. [{DEFAULT_GATEWAY}]")
    ] = None,
    gateway_id: Annotated[str, typer.Option("--id", callback=_name, help="Default: random.")] = "",
    reflection: Annotated[
        bool | None, typer.Option("--reflection/--no-reflection", help="Serve gRPC reflection.")
    ] = None,
    tls_certificate: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="Callers need a key of this file; see `sessile keys`.")
    ] = None,
    jwt_jwks: Annotated[
        Path | None, typer.Option(help="Callers need a token signed by a key of this JWKS file.")
    ] = None,
    jwt_issuer: Annotated[str | None, typer.Option(help="Its iss.")] = None,
    jwt_audience: Annotated[str | None, typer.Option(help="Its aud.")] = None,
    audit_log: Annotated[
        Path | None, typer.Option(help="File that operators' actions are appended to.")
    ] = None,
    insecure: InsecureOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    log_level: LogLevelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one gateway in this process."""
    from gateway.main import run

    flags = from_flags(
        ("redis_url", "--redis", redis),
        ("redis.wait_s", "--store-wait-s", store_wait_s),
        ("data_directory", "--data-directory", data_directory),
        ("listen", "--listen", listen),
        ("gateway_id", "--id", gateway_id or None),
        ("reflection", "--reflection", reflection),
        *_tls_flags(tls_certificate, tls_key, tls_ca, insecure),
        ("security.api_keys", "--api-keys", api_keys),
        ("security.jwt.jwks", "--jwt-jwks", jwt_jwks),
        ("security.jwt.issuer", "--jwt-issuer", jwt_issuer),
        ("security.jwt.audience", "--jwt-audience", jwt_audience),
        ("security.audit_log", "--audit-log", audit_log),
        ("telemetry.log_level", "--log-level", log_level),
    )
    with reported_errors(StoreError, ValueError):
        settings = loaded("gateway", config, flags, assignments)
        logs = settings.telemetry
        log_to(logs.log_level, logs.log_format, {"gateway": settings.gateway_id})
        run(settings, _announcer("gateway", settings.gateway_id, as_json))


def worker(
    redis: RedisOption = None,
    store_wait_s: StoreWaitOption = None,
    replica_id: Annotated[
        str,
        typer.Option(
            "--id", callback=_name, help="Default: a new one of the host's name and random letters."
        ),
    ] = "",
    engine: EngineOption = None,
    model: ModelOption = "",
    engine_option: EngineOptions = None,
    engine_arguments: EngineArguments = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port of the replica service. [127.0.0.1, a free port]")
    ] = None,
    kv_listen: Annotated[
        str | None, typer.Option(help="host:port of the KV channel. [127.0.0.1, a free port]")
    ] = None,
    advertise_host: Annotated[
        str | None, typer.Option(help="Host under which gateways and peers reach this worker.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Free text, for operators.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Free text, for operators.")] = None,
    tls_certificate: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    insecure: InsecureOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    log_level: LogLevelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one worker (a replica with its engine) in this process."""
    from workers.engines.port import EngineFailed
    from workers.heartbeat import ReplicaReplaced
    from workers.main import run
    from workers.text.port import TemplateRefused

    flags = from_flags(
        ("redis_url", "--redis", redis),
        ("redis.wait_s", "--store-wait-s", store_wait_s),
        ("replica.replica_id", "--id", replica_id or None),
        ("engine", "--engine", engine and str(engine)),
        ("listen", "--listen", listen),
        ("kv_listen", "--kv-listen", kv_listen),
        ("advertise_host", "--advertise-host", advertise_host),
        ("replica.site", "--site", site),
        ("replica.hardware", "--hardware", hardware),
        *_tls_flags(tls_certificate, tls_key, tls_ca, insecure),
        ("telemetry.log_level", "--log-level", log_level),
        *(
            (f"engine_options.{name}", f"--engine-option {name}", value)
            for name, value in parse_options(engine_option, model, engine_arguments)
        ),
    )
    # ValueError, ImportError, TemplateRefused: the engine's own options, the packages it needs, the
    # model's tokenizer and template.
    errors = (StoreError, ValueError, ImportError, TemplateRefused, EngineFailed, ReplicaReplaced)
    with reported_errors(*errors):
        settings = loaded("worker", config, flags, assignments)
        logs = settings.telemetry
        log_to(logs.log_level, logs.log_format, {"replica": settings.replica.replica_id})
        run(settings, _announcer("worker", settings.replica.replica_id, as_json))


def _tls_flags(
    certificate: Path | None, key: Path | None, ca: Path | None, insecure: bool | None
) -> tuple[tuple[str, str, Any], ...]:
    return (
        ("security.tls.certificate", "--tls-certificate", certificate),
        ("security.tls.key", "--tls-key", key),
        ("security.tls.ca", "--tls-ca", ca),
        ("security.allow_insecure", "--insecure", insecure),
    )


def loaded(
    process: str, file: Path | None, flags: Tree, assignments: list[str] | None = None
) -> Any:
    """The configuration of this process; what is refused is a usage error, each with its fix."""
    from gateway.cli.settings import load

    try:
        return load(
            process,
            file=file,
            flags=flags,
            assignments=assignments or (),
            generated=made_up_names(process),
        ).config
    except SettingsRefused as refused:
        for problem in refused.problems:
            tell(problem)
        raise typer.Exit(2) from refused


def made_up_names(process: str) -> Tree:
    """Names for a process that is given none, and what else is the command's own default."""
    if process == "gateway":
        return from_flags(("gateway_id", MADE_UP, f"gateway-{_suffix()}"))
    return from_flags(
        ("replica.replica_id", MADE_UP, f"{socket.gethostname()}-{_suffix()}"),
        ("replica.drain_grace_s", "`sessile worker`", DRAIN_GRACE_S),
    )


def _suffix() -> str:
    return secrets.token_hex(3)


def _announcer(kind: str, name: str, as_json: bool) -> Announce:
    """Writes the one line on standard output by which a process says where it serves."""

    def announce(address: str) -> None:
        if as_json:
            print_json({"kind": kind, "name": name, "address": address, "pid": os.getpid()})
        else:
            typer.echo(f"sessile {kind} {name} on {address}")

    return announce


def parse_options(
    options: list[str] | None, model: str, arguments: list[str] | None = None
) -> tuple[tuple[str, str], ...]:
    """``NAME=VALUE`` pairs, with the model and ``--name value`` arguments among them (a flag is
    ``true``); a usage error for anything else."""
    pairs = [("model", model)] if model else []
    for option in options or ():
        name, equals, value = option.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"an engine option is NAME=VALUE, not {option!r}")
        pairs.append((name, value))
    words = list(arguments or ())
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise typer.BadParameter(f"an engine's argument is --name value, not {word!r}")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        pairs.append((name.replace("-", "_"), value))
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise typer.BadParameter(f"engine option {twice[0]} is given twice")
    return tuple(pairs)


async def _up(cluster: Cluster, listen: str, gateways: int, replicas: int, as_json: bool) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_run_fleet, cluster, listen, gateways, replicas, as_json)
            async for _ in signals:
                tasks.cancel_scope.cancel()
                return


async def _run_fleet(
    cluster: Cluster, listen: str, gateways: int, replicas: int, as_json: bool
) -> None:
    # On its own store the names are free, and the next run on the same data takes them again.
    suffix = f"-{_suffix()}" if cluster.redis_url else ""
    async with cluster:
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            console=console(),
            transient=True,
            disable=as_json,
        ) as progress:
            progress.add_task(
                f"starting gateways ({gateways}) and {cluster.engine} replicas ({replicas})"
            )
            await cluster.start(gateways=gateways, workers=replicas, listen=listen, suffix=suffix)
        _announce(cluster, as_json)
        await _report_deaths(cluster)


def _announce(cluster: Cluster, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "gateways": cluster.targets,
                "replicas": {child.name: child.address for child in cluster.workers},
                "pids": {child.name: child.pid for child in cluster.children},
                "redis": redacted(cluster.redis_url),
                "logs": str(cluster.log_directory),
            }
        )
        return
    target = cluster.targets[0]
    lines = [
        f"gateways  {' '.join(cluster.targets)}",
        f"replicas  {' '.join(f'{child.name}={child.address}' for child in cluster.workers)}",
        f"store     {redacted(cluster.redis_url)}",
        f"logs      {cluster.log_directory}",
        "",
        f"sessile chat -g {target}",
        f"sessile replicas ls -w -g {target}",
    ]
    console().print(Panel.fit("\n".join(lines), title="sessile", subtitle="Ctrl-C stops it all"))


async def _report_deaths(cluster: Cluster) -> NoReturn:
    """Says which children end. Raises LaunchFailed when none is left."""
    from gateway.cli.launch import LaunchFailed

    told: set[Child] = set()
    while any(child.running for child in cluster.children):
        for child in cluster.children:
            if not child.running and child not in told:
                told.add(child)
                typer.echo(f"{child.name} ended with {child.exit_code}: {child.log}", err=True)
        await anyio.sleep(WATCH_INTERVAL_S)
    raise LaunchFailed("every process of the fleet has ended")
