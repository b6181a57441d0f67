"""``sessile health``: one gRPC health check, for containers and others that run a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.cli.output import fail

LIVENESS = "liveness"
"""As in ``gateway.rpc.health``, which is not imported for one question."""


def health(
    address: Annotated[str, typer.Argument(help="host:port of a gateway or a worker.")],
    live: Annotated[
        bool, typer.Option("--live", help="Only whether it answers, not whether it is ready.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds.")] = 2.0,
    tls_ca: Annotated[Path | None, typer.Option(help="PEM; the process speaks TLS.")] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM, where one is asked for.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
) -> None:
    """Ask a gateway or a worker whether it is ready: 0 if it is, 1 if not."""
    try:
        status = check(address, LIVENESS if live else "", timeout, tls_ca, tls_certificate, tls_key)
    except OSError as error:
        fail(f"a certificate cannot be read: {error}")
    except grpc.RpcError as error:
        details = error.details() if isinstance(error, grpc.Call) else str(error)
        fail(f"{address} does not answer: {details}", "Does it run, and with TLS or without?")
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    if status != health_pb2.HealthCheckResponse.SERVING:
        fail(f"{address} is {name}", "It waits for its store, or ends. Its log says which.")
    typer.echo(name)


def check(
    address: str,
    service: str,
    timeout_s: float,
    ca: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> int:
    """The status in the gRPC health service. Raises grpc.RpcError, and OSError for the files."""
    with _channel(address, ca, certificate, key) as channel:
        return asked(channel, service, timeout_s)


def asked(channel: grpc.Channel, service: str, timeout_s: float) -> int:
    """The same over a channel. Raises grpc.RpcError."""
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    answer = stub.Check(request, timeout=timeout_s, wait_for_ready=False)
    return int(answer.status)


def _channel(
    address: str, ca: Path | None, certificate: Path | None, key: Path | None
) -> grpc.Channel:
    if ca is None and certificate is None:
        return grpc.insecure_channel(address)
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes() if ca else None,
        key.read_bytes() if key else None,
        certificate.read_bytes() if certificate else None,
    )
    return grpc.secure_channel(address, credentials)
