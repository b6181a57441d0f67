"""Certificates for tests: a CA, and files of certificates that it has signed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from gateway.security.config import TlsConfig
from gateway.security.tls import Tls

HOST = "127.0.0.1"


class Authority:
    """A CA whose files are in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.certificate = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.certificate))

    @property
    def pem(self) -> bytes:
        return self._ca.cert_pem.bytes()

    def issue(
        self, name: str, *hosts: str, expires: datetime | None = None, ca: Path | None = None
    ) -> TlsConfig:
        """Files ``name``.crt and .key (again: new ones), for these hosts (default: loopback)."""
        signed = self._ca.issue_cert(*(hosts or (HOST, "localhost")), not_after=expires)
        key, certificate = self.directory / f"{name}.key", self.directory / f"{name}.crt"
        signed.private_key_pem.write_to_path(str(key))
        certificate.write_bytes(b"".join(pem.bytes() for pem in signed.cert_chain_pems))
        return TlsConfig(certificate, key, ca or self.certificate)

    def tls(self, name: str, *hosts: str, check_interval_s: float = 0.0) -> Tls:
        return Tls(self.issue(name, *hosts), check_interval_s=check_interval_s)


def yesterday() -> datetime:
    return datetime.now(UTC) - timedelta(days=1)
