"""Settings of security: frozen, checked once. Nothing here reads a file."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

ASYMMETRIC = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
"""Signatures of tokens that may be allowed. A shared secret (HS256) is not among them: whoever can
check a token could also make one, and a public key could be taken for the secret."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Certificate of a process, and whom it believes. Files are PEM; they are read again when they
    change, so that a certificate is renewed without a restart."""

    certificate: Path
    """The certificate, and behind it the intermediate ones, if any."""
    key: Path
    """Its private key, without a passphrase."""
    ca: Path | None = None
    """Certificates of those who may sign for the other side: for callers that show a certificate,
    and for replicas that are called."""
    require_client_certificate: bool = False
    """Of callers of the gateway, and of who reads ``/metrics``. Replicas and KV channels always
    require one."""
    peer_name: str = ""
    """The name that certificates of replicas carry, where they do not carry their hosts."""

    def __post_init__(self) -> None:
        if self.require_client_certificate and self.ca is None:
            raise ValueError("require_client_certificate needs ca: who signs for the callers")


@dataclass(frozen=True, slots=True)
class JwtConfig:
    """Which JSON Web Tokens are believed."""

    jwks: Path
    """The issuer's public keys (a JSON Web Key Set); read again when the file changes."""
    issuer: str
    """``iss`` has to be this."""
    audience: str
    """``aud`` has to be or contain this."""
    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")
    """Signatures taken; public-key ones only."""
    leeway_s: float = 30.0
    """How far the issuer's clock may be off."""
    tenant_claim: str = "tenant"
    """The claim that names the tenant; a dot goes into an object."""
    role_claim: str = "role"
    """The claim that names the role (agent, operator), or lists some. Without it: agent."""

    def __post_init__(self) -> None:
        unknown = set(self.algorithms) - ASYMMETRIC
        if unknown or not self.algorithms:
            raise ValueError(f"algorithms are out of {', '.join(sorted(ASYMMETRIC))}")
        if not self.issuer or not self.audience:
            raise ValueError("issuer and audience must be given: else tokens for others are taken")
        if self.leeway_s < 0:
            raise ValueError("leeway_s must not be negative")


@dataclass(frozen=True, slots=True)
class GatewaySecurity:
    """Who may call a gateway, and how it speaks. Without settings: anybody on this machine."""

    tls: TlsConfig | None = None
    """Of the listener, and of the one for Prometheus."""
    parts: TlsConfig | None = None
    """The gateway's own certificate towards replicas. None: that of the listener, if it has a
    ca."""
    api_keys: Path | None = None
    """File made by ``sessile keys``; read again when it changes."""
    jwt: JwtConfig | None = None
    """Beside API keys, or instead of them."""
    audit_log: Path | None = None
    """Operators' actions are appended to this file, a JSON object a line. None: only logged."""
    allow_insecure: bool = False
    """Off loopback too, without TLS or without authentication: on a network that is trusted."""

    @property
    def authenticates(self) -> bool:
        """Callers have to show a key or a token."""
        return self.api_keys is not None or self.jwt is not None

    @property
    def towards_replicas(self) -> TlsConfig | None:
        """With which certificate replicas are called; None: they are called without TLS."""
        if self.parts is not None:
            return self.parts
        return self.tls if self.tls is not None and self.tls.ca is not None else None

    def __post_init__(self) -> None:
        if self.parts is not None and self.parts.ca is None:
            raise ValueError("parts needs ca: who signs for the replicas")

    def check_listener(self, setting: str, host: str) -> None:
        """Raises ValueError if the host may not be listened on like this."""
        if self.allow_insecure or is_loopback(host):
            return
        if self.tls is None or not self.authenticates:
            missing = " and ".join(
                [*["TLS"] * (self.tls is None), *["authentication"] * (not self.authenticates)]
            )
            raise ValueError(
                f"{setting} {host} is not on loopback, and there is no {missing}: give"
                " --tls-certificate and --tls-key, and --api-keys or --jwt-jwks; or --insecure"
                " (allow_insecure) if everybody who reaches that address may do everything"
            )

    def check_metrics(self, setting: str, host: str) -> None:
        """Raises ValueError if metrics may not be served on the host like this."""
        _check_metrics(setting, host, self.tls, allow_insecure=self.allow_insecure)


@dataclass(frozen=True, slots=True)
class WorkerSecurity:
    """How a worker speaks with gateways and other workers. With TLS both sides show certificates,
    and only those that the ca has signed may call."""

    tls: TlsConfig | None = None
    """Of the replica service and the KV channel, towards other replicas, and of the listener for
    Prometheus (which asks for a certificate only if ``require_client_certificate`` is set)."""
    allow_insecure: bool = False
    """Off loopback too, without TLS: on a network that is trusted."""

    def __post_init__(self) -> None:
        if self.tls is not None and self.tls.ca is None:
            raise ValueError("a worker's tls needs ca: who signs for gateways and other workers")

    def check_listener(self, setting: str, host: str) -> None:
        """Raises ValueError if the host may not be listened on like this."""
        if self.tls is None and not self.allow_insecure and not is_loopback(host):
            raise ValueError(
                f"{setting} {host} is not on loopback, and there is no TLS: give --tls-certificate,"
                " --tls-key and --tls-ca; or --insecure (allow_insecure) if everybody who reaches"
                " that address may read and run every session"
            )

    def check_metrics(self, setting: str, host: str) -> None:
        """Raises ValueError if metrics may not be served on the host like this."""
        _check_metrics(setting, host, self.tls, allow_insecure=self.allow_insecure)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host. A name other than localhost is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_metrics(setting: str, host: str, tls: TlsConfig | None, *, allow_insecure: bool) -> None:
    if tls is None and not allow_insecure and not is_loopback(host):
        raise ValueError(
            f"{setting} {host} is not on loopback, and there is no TLS: give --tls-certificate and"
            " --tls-key; or --insecure (allow_insecure) if everybody there may read the metrics"
        )
