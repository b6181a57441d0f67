"""What security costs: TLS and authentication per call, TLS on the KV channel.

    python -m loadtest.bench.security [--calls 2000] [--megabytes 256] [--runs 7]

Calls go through the gateway's own handlers to an application call that does nothing, one after the
other, client and server in one process on loopback; the variants take turns, so that a noisy
machine is noisy for all of them. The KV channel is measured between two processes, as
``loadtest.bench.kv_channel`` does. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import grpc
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from grpc import aio
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from sessile.v1 import session_pb2

from gateway.app.admission import Gate
from gateway.rpc.auth import Authenticator, Bearer, HeaderTenant
from gateway.rpc.serving import Serving
from gateway.security.access import Role
from gateway.security.config import GatewaySecurity, JwtConfig, TlsConfig
from gateway.security.keys import edited, new_key
from gateway.security.tls import Tls
from loadtest.bench.kv_channel import Shape, measure

HOST = "127.0.0.1"
ISSUER, AUDIENCE = "bench", "sessile"
ROUND = 100
"""Calls of one variant before the next has its turn."""
METHOD = "/bench/Get"


@dataclass(frozen=True, slots=True)
class Variant:
    """How calls are made."""

    name: str
    authenticator: Authenticator
    metadata: tuple[tuple[str, str], ...] = ()
    tls: Tls | None = None


def self_signed(directory: Path) -> TlsConfig:
    """A certificate for loopback that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), False)
        .sign(key, hashes.SHA256())
    )
    config = TlsConfig(directory / "crt", directory / "key", directory / "crt")
    config.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    config.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return config


def variants(directory: Path, tls: Tls) -> list[Variant]:
    """Without anything first; the others are compared with it."""
    now = datetime.now(UTC)
    secret, key = new_key("acme", Role.AGENT, now)
    with edited(directory / "keys.toml") as keys:
        keys.append(key)
    by_key = Bearer(GatewaySecurity(api_keys=directory / "keys.toml"))
    found = [
        Variant("plain, no authentication", HeaderTenant()),
        Variant("TLS", HeaderTenant(), (), tls),
        Variant("TLS and API key", by_key, _bearer(secret), tls),
    ]
    private: Any
    for algorithm, private, kind in (
        ("ES256", ec.generate_private_key(ec.SECP256R1()), ECAlgorithm),
        ("RS256", rsa.generate_private_key(public_exponent=65537, key_size=2048), RSAAlgorithm),
    ):
        jwks = directory / algorithm
        public = json.loads(kind.to_jwk(private.public_key()))
        jwks.write_text(json.dumps({"keys": [{**public, "kid": "1", "alg": algorithm}]}))
        claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": now + timedelta(hours=1), "tenant": "a"}
        token = jwt.encode(claims, private, algorithm=algorithm, headers={"kid": "1"})
        by_token = Bearer(GatewaySecurity(jwt=JwtConfig(jwks, ISSUER, AUDIENCE)))
        found.append(Variant(f"TLS and JWT ({algorithm})", by_token, _bearer(token), tls))
    return found


async def calls(given: Sequence[Variant], count: int) -> dict[str, dict[str, float]]:
    """Microseconds by variant: a whole call, and its authentication alone."""
    taken: dict[str, list[float]] = {variant.name: [] for variant in given}
    alone: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        methods = {}
        for variant in given:
            methods[variant.name] = await _opened(stack, variant)
            headers = dict(variant.metadata)
            times = []
            for _ in range(count):
                start = time.perf_counter()
                await variant.authenticator.caller(headers)
                times.append((time.perf_counter() - start) * 1e6)
            alone[variant.name] = statistics.median(times)
        request = session_pb2.GetSessionRequest(session_id="ses_a").SerializeToString()
        for turn in range(count // ROUND + 1):
            for variant in given:
                method = methods[variant.name]
                for _ in range(ROUND):
                    start = time.perf_counter()
                    await method(request, metadata=variant.metadata)
                    if turn:  # the first round warms up
                        taken[variant.name].append((time.perf_counter() - start) * 1e6)
    return {
        name: {
            "call_us_median": round(statistics.median(values), 1),
            "call_us_p99": round(statistics.quantiles(values, n=100)[98], 1),
            "authentication_us": round(alone[name], 1),
        }
        for name, values in taken.items()
    }


async def _opened(stack: AsyncExitStack, variant: Variant) -> Any:
    async def get(tenant: str, request: Any) -> session_pb2.GetSessionResponse:
        del tenant, request
        return session_pb2.GetSessionResponse()

    gate = Gate("max_calls", 64, 1)
    serving = Serving(variant.authenticator, gate, gate)
    server = aio.server()
    handlers = {"Get": serving.unary(get, session_pb2.GetSessionRequest)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    if variant.tls is None:
        port = server.add_insecure_port(f"{HOST}:0")
        channel = aio.insecure_channel(f"{HOST}:{port}")
    else:
        credentials = variant.tls.server_credentials(require_client_certificate=True)
        port = server.add_secure_port(f"{HOST}:0", credentials)
        channel = aio.secure_channel(f"{HOST}:{port}", variant.tls.channel_credentials())
    await server.start()
    stack.push_async_callback(server.stop, None)
    stack.push_async_callback(channel.close)
    return channel.unary_unary(METHOD)


def _bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--page-kib", type=int, default=720)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = self_signed(directory)
        result: dict[str, Any] = {
            "calls": anyio.run(calls, variants(directory, Tls(config)), arguments.calls)
        }
        page_bytes = arguments.page_kib << 10
        pages = max(1, (arguments.megabytes << 20) // page_bytes)
        for label, tls in (("kv_plain_gb_per_s", None), ("kv_tls_gb_per_s", config)):
            shape = Shape(pages, page_bytes, uvloop=True, tls=tls)
            result[label] = asdict(measure(shape, arguments.runs, channel=True))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
