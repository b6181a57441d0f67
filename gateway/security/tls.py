"""TLS of one process: credentials for its listeners and for its calls, renewed while it runs.

An endpoint of a replica or of its KV channel is ``host:port``, or ``tls://host:port`` where TLS is
spoken: whoever hands an endpoint on (the registration, a plan, an export) says so with it.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
from cryptography import x509

from gateway.security.config import TlsConfig, is_loopback
from gateway.security.reload import CHECK_INTERVAL_S, Reloaded, read

log = logging.getLogger(__name__)

SCHEME = "tls://"


class InsecureEndpoint(ValueError):
    """An endpoint that must not be called as it is; the message says what to change."""


@dataclass(frozen=True, slots=True)
class _Material:
    """Everything that is made of the files, at once: certificate, key and ca belong together."""

    expires: datetime
    server: grpc.ServerCertificateConfiguration
    channel: grpc.ChannelCredentials
    serving: ssl.SSLContext
    metrics: ssl.SSLContext
    calling: ssl.SSLContext


class Tls:
    """A process's certificate and whom it believes, as the files are now. Raises OSError or
    ValueError (also for a certificate that has expired, or that is not the key's) at first; later
    the last good files stay in use."""

    def __init__(
        self,
        config: TlsConfig,
        *,
        check_interval_s: float = CHECK_INTERVAL_S,
        utc_now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.config = config
        self._utc_now = utc_now
        paths = [config.certificate, config.key, *([config.ca] if config.ca is not None else [])]
        self._files = Reloaded(paths, self._load, check_interval_s=check_interval_s)

    @property
    def expires(self) -> datetime:
        """When the certificate in use does."""
        return self._files.current().expires

    @property
    def generation(self) -> int:
        """Changes when the files were read again: connections made before know the old ones."""
        self._files.current()
        return self._files.generation

    def server_credentials(self, *, require_client_certificate: bool) -> grpc.ServerCredentials:
        """For a listener. New connections get the files as they are then."""
        given = self._files.current()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            now = self._files.current()
            if now is given:
                return None
            given = now
            return now.server

        return grpc.dynamic_ssl_server_credentials(
            given.server,
            renewed,  # type: ignore[arg-type]  # None: the same as before
            require_client_authentication=require_client_certificate,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For calls to others; of the files as they are now, for as long as the channel is used."""
        return self._files.current().channel

    def channel_options(self) -> list[tuple[str, str]]:
        """Of a channel with these credentials."""
        name = self.config.peer_name
        return [("grpc.ssl_target_name_override", name)] if name else []

    def serving(self) -> ssl.SSLContext:
        """For a KV channel that serves: only who shows a certificate of the ca."""
        return self._files.current().serving

    def metrics(self) -> ssl.SSLContext:
        """For the listener of Prometheus, which needs no certificate unless it is required:
        whoever has one of a fleet's ca could call its replicas."""
        return self._files.current().metrics

    def calling(self) -> ssl.SSLContext:
        """For calls of a KV channel."""
        return self._files.current().calling

    def _load(self) -> _Material:
        config = self.config
        certificate, key = read(config.certificate), read(config.key)
        ca = read(config.ca) if config.ca is not None else None
        serving = _context(config, ssl.PROTOCOL_TLS_SERVER, ca)
        serving.verify_mode = ssl.CERT_REQUIRED
        metrics = _context(config, ssl.PROTOCOL_TLS_SERVER, ca)
        if config.require_client_certificate:
            metrics.verify_mode = ssl.CERT_REQUIRED
        expires = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
        if expires <= self._utc_now():
            raise ValueError(f"{config.certificate} expired at {expires:%Y-%m-%d %H:%M} UTC")
        return _Material(
            expires,
            grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca),
            grpc.ssl_channel_credentials(ca, key, certificate),
            serving,
            metrics,
            _context(config, ssl.PROTOCOL_TLS_CLIENT, ca),
        )


def _context(config: TlsConfig, protocol: int, ca: bytes | None) -> ssl.SSLContext:
    """Raises OSError (ssl.SSLError is one) if the files cannot be used together."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # A key with a passphrase would ask for it on the terminal.
        context.load_cert_chain(config.certificate, config.key, password=lambda: "")
    except ssl.SSLError as error:
        raise ValueError(
            f"{config.certificate} and {config.key} are no certificate and its key, without a"
            f" passphrase: {error.reason or error}"
        ) from error
    if ca is not None:
        try:
            context.load_verify_locations(cadata=ca.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError) as error:
            raise ValueError(f"{config.ca} holds no certificates: {error}") from error
    return context


def endpoint_of(address: str, tls: Tls | None) -> str:
    """What is told of a listener at host:port."""
    return address if tls is None else SCHEME + address


def dialled(endpoint: str, tls: Tls | None, *, allow_insecure: bool) -> tuple[str, Tls | None]:
    """Address host:port of an endpoint, and with what it is called (None: without TLS). Raises
    InsecureEndpoint for one that speaks TLS where this process has no certificate, and for one off
    loopback that does not, unless ``allow_insecure``."""
    address = endpoint.removeprefix(SCHEME)
    if address != endpoint:
        if tls is None:
            raise InsecureEndpoint(
                f"{endpoint[:128]} speaks TLS and this process has no certificate for it: give it"
                " --tls-certificate, --tls-key and --tls-ca"
            )
        return address, tls
    if not allow_insecure and not is_loopback(address.rpartition(":")[0]):
        raise InsecureEndpoint(
            f"{endpoint[:128]} does not speak TLS and is not on loopback: start it with"
            " --tls-certificate, --tls-key and --tls-ca, or this process with --insecure"
        )
    return address, None
