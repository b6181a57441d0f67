"""Clients of the redis library for an address: pools, TLS, credentials.

The library's own silent retries are off: repeats belong to the script runner, which has the
injected clock. Time limits are the executor's, for whole calls; only who is asked for directions (a
Sentinel, a node of a Cluster that may be gone) has one of its own, so that the next can be asked
within the same attempt.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelManagedConnection, SentinelManagedSSLConnection
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from statestore.connection import StoreAddress, StoreConnection
from statestore.ports import StoreMisconfigured

MAX_CONNECTIONS = 64
"""Per process and server; further calls wait for one (in a Cluster: fail and are repeated)."""
SENTINEL_TIMEOUT_S = 0.4
"""Then the next Sentinel is asked."""
NODE_CONNECT_TIMEOUT_S = 0.8
"""Of one node of a Cluster, whose others may know who took its place."""


class _FreshTls(SSLConnection):
    """Reads its certificates whenever it connects: renewed ones need no restart."""

    def _connection_arguments(self) -> Any:
        given = self.ssl_context
        given.context = _tls_context(
            given.ca_certs, given.certfile, given.keyfile, check_hostname=given.check_hostname
        )
        return super()._connection_arguments()


class _FreshSentinelTls(_FreshTls, SentinelManagedSSLConnection):
    """The same behind Sentinel."""


class _PasswordFile(CredentialProvider):
    """Credentials whose password is read whenever a connection is made."""

    def __init__(self, username: str, path: Path) -> None:
        self._username = username
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = read_password(self._path)
        return (self._username, password) if self._username else (password,)


def read_password(path: Path) -> str:
    """The text of the file without its line end. Raises StoreMisconfigured."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreMisconfigured(
            f"the store's password_file cannot be read: {error}; it has to be a text file that this"
            " process may read"
        ) from error


def check_files(address: StoreAddress, connection: StoreConnection) -> None:
    """Reads every file that connections will. Raises StoreMisconfigured for one that is missing,
    is no certificate, or a key of another certificate."""
    if connection.password_file is not None:
        read_password(connection.password_file)
    if not address.tls:
        return
    try:
        _tls_context(connection.tls_ca, connection.tls_certificate, connection.tls_key)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(
            str(path)
            for path in (connection.tls_ca, connection.tls_certificate, connection.tls_key)
            if path is not None
        )
        raise StoreMisconfigured(
            f"the certificates for the store cannot be used ({files}): {error}; each has to be a"
            " PEM file that this process may read, and tls_key the key of tls_certificate"
        ) from error


def server_client(address: StoreAddress, connection: StoreConnection) -> Redis:
    """Of one server; further calls than MAX_CONNECTIONS wait."""
    options = _options() | _credentials(address, connection) | _tls(address, connection)
    if address.socket:
        place: dict[str, Any] = {"path": address.socket}
        kind: type[Any] = UnixDomainSocketConnection
    else:
        ((host, port),) = address.hosts
        place = {"host": host, "port": port}
        kind = _FreshTls if address.tls else Connection
    pool = BlockingConnectionPool(
        connection_class=kind,
        max_connections=MAX_CONNECTIONS,
        timeout=None,
        db=address.db,
        **place,
        **options,
    )
    return Redis.from_pool(pool)


def sentinel_client(
    address: StoreAddress, connection: StoreConnection
) -> tuple[Redis, list[Redis]]:
    """The present primary of a service, and the Sentinels that know it."""
    tls = _tls(address, connection)
    asked = _options() | {
        "socket_connect_timeout": SENTINEL_TIMEOUT_S,
        "socket_timeout": SENTINEL_TIMEOUT_S,
        "username": connection.sentinel_username or None,
        "password": connection.sentinel_password or None,
    }
    sentinel: Any = cast(Any, Sentinel)([])
    sentinel.sentinels = [
        Redis.from_pool(
            ConnectionPool(
                connection_class=_FreshTls if address.tls else Connection,
                host=host,
                port=port,
                **asked,
                **tls,
            )
        )
        for host, port in address.hosts
    ]
    primary = sentinel.master_for(
        address.service,
        connection_class=_FreshSentinelTls if address.tls else SentinelManagedConnection,
        max_connections=MAX_CONNECTIONS,
        db=address.db,
        **_options(),
        **_credentials(address, connection),
        **tls,
    )
    return primary, sentinel.sentinels


def cluster_client(address: StoreAddress, connection: StoreConnection) -> RedisCluster:
    """Of a Cluster, whose nodes are found from those in the address."""
    tls = _tls(address, connection)
    client = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
        max_connections=MAX_CONNECTIONS,
        ssl=address.tls,
        **_options() | {"socket_connect_timeout": NODE_CONNECT_TIMEOUT_S},
        **_credentials(address, connection),
        **tls,
    )
    if address.tls:
        # The client takes no class for its connections; nodes that it finds get it from here.
        client.connection_kwargs["connection_class"] = _FreshTls
        for node in client.startup_nodes:
            node.connection_class = _FreshTls
    return client


def _options() -> dict[str, Any]:
    """Of every connection."""
    return {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "protocol": 2,
        # Else it asks for CLIENT SETINFO, which Redis 7.0 has not and a user may lack.
        "driver_info": None,
    }


def _credentials(address: StoreAddress, connection: StoreConnection) -> dict[str, Any]:
    if connection.password_file is not None:
        provider = _PasswordFile(address.username, connection.password_file)
        return {"credential_provider": provider}
    found = {"username": address.username, "password": address.password}
    return {name: value for name, value in found.items() if value}


def _tls(address: StoreAddress, connection: StoreConnection) -> dict[str, Any]:
    if not address.tls:
        return {}
    files = {
        "ssl_ca_certs": connection.tls_ca,
        "ssl_certfile": connection.tls_certificate,
        "ssl_keyfile": connection.tls_key,
    }
    return {
        "ssl_check_hostname": connection.tls_check_hostname,
        **{name: str(path) for name, path in files.items() if path is not None},
    }


def _tls_context(
    ca: str | Path | None,
    certificate: str | Path | None,
    key: str | Path | None,
    *,
    check_hostname: bool = True,
) -> ssl.SSLContext:
    """TLS 1.2 or newer; with a CA given, no other is trusted. Raises OSError."""
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = check_hostname
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context
