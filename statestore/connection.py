"""How a process reaches the store: a URL, and what does not belong into one.

    redis://[user:password@]host[:port][/db]              one server
    unix://[user:password@]/path/to/socket[?db=N]         one server on this machine
    redis+sentinel://[user:password@]host[:port],…/service[/db]
    redis+cluster://[user:password@]host[:port],…

``rediss``, ``rediss+sentinel`` and ``rediss+cluster`` are the same with TLS. Everything here is
plain data; nothing is opened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote

Kind = Literal["server", "sentinel", "cluster"]

_KINDS: dict[str, Kind] = {"": "server", "sentinel": "sentinel", "cluster": "cluster"}
_DEFAULT_PORTS = {"server": 6379, "sentinel": 26379, "cluster": 6379}
_CREDENTIALS = re.compile(r"(?<=://).*@", re.DOTALL)
MASK = "***"
MAX_WAIT_TIMEOUT_MS = 900
"""Below the time limit of one attempt (1 s), so that it is the server that says what is missing."""


@dataclass(frozen=True, slots=True)
class StoreConnection:
    """What a connection to the store needs beside its URL. Contradictions raise ValueError."""

    username: str = ""
    """ACL user; empty: the one in the URL, or the server's default user."""
    password: str = field(default="", repr=False, metadata={"secret": True})
    """Of the user, if it is neither in the URL nor in a file."""
    password_file: Path | None = None
    """File with the password, read anew for each connection: a changed one needs no restart."""
    sentinel_username: str = ""
    """ACL user of the Sentinels themselves; the other credentials are of the servers they watch."""
    sentinel_password: str = field(default="", repr=False, metadata={"secret": True})
    tls_ca: Path | None = None
    """Certificates (PEM) that may sign the servers'; None: those that the system trusts."""
    tls_certificate: Path | None = None
    """Certificate chain (PEM) of this client, for servers that ask for one. It, its key and tls_ca
    are read anew for each connection."""
    tls_key: Path | None = None
    tls_check_hostname: bool = True
    """Whether a server's certificate must name the host that was called. Off: any certificate of
    the CA will do, for clusters whose nodes announce addresses that their certificates lack."""
    wait_s: float | None = None
    """How long a process waits at its start for a store that is not there; None: for ever."""
    wait_replicas: int = 0
    """Replicas of the store that must have a write before it counts (WAIT); 0: only the primary."""
    wait_timeout_ms: int = 500
    """How long one attempt waits for these replicas; then it is repeated, and turns wait."""

    def __post_init__(self) -> None:
        if self.password and self.password_file is not None:
            raise ValueError("password and password_file contradict each other: give one of them")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both or neither")
        if self.wait_s is not None and self.wait_s < 0:
            raise ValueError("wait_s must not be negative; leave it out to wait for ever")
        if self.wait_replicas < 0:
            raise ValueError("wait_replicas must not be negative")
        if not 1 <= self.wait_timeout_ms <= MAX_WAIT_TIMEOUT_MS:
            raise ValueError(f"wait_timeout_ms must be 1 to {MAX_WAIT_TIMEOUT_MS}")


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A URL, taken apart and joined with the settings beside it."""

    kind: Kind
    hosts: tuple[tuple[str, int], ...]
    """Of a server: one; of a Sentinel service or a Cluster: any number to begin with."""
    tls: bool
    username: str
    password: str = field(repr=False)
    socket: str = ""
    """Path of a unix socket, in the place of ``hosts``."""
    service: str = ""
    """Name of the service that Sentinels watch."""
    db: int = 0


def parse_address(url: str, connection: StoreConnection) -> StoreAddress:
    """Raises ValueError for a URL of another form and for settings that contradict it; the message
    has nothing of the URL but its scheme."""
    scheme, found, rest = url.partition("://")
    base, _, variant = scheme.partition("+")
    if not found or base not in ("redis", "rediss", "unix") or variant not in _KINDS:
        given = f"not {scheme}://" if found else "and this one has no ://"
        raise ValueError(
            "a store URL begins with redis://, rediss://, unix://, redis+sentinel:// or"
            f" redis+cluster://, {given}"
        )
    kind = _KINDS[variant]
    if base == "unix" and kind != "server":
        raise ValueError(f"{scheme}:// is no store URL: Sentinels and Clusters are reached by TCP")
    credentials, _, rest = rest.rpartition("@")
    rest, _, query = rest.partition("?")
    username, _, password = (unquote(part) for part in credentials.partition(":"))
    authority, _, path = rest.partition("/")
    tls = base == "rediss"
    _check_settings(connection, scheme=scheme, tls=tls, username=username, password=password)
    service, db = "", _query_db(query)
    if base == "unix":
        if authority or not path:
            raise ValueError("a unix store URL has an absolute path: unix:///path/to/socket")
        hosts: tuple[tuple[str, int], ...] = ()
    else:
        hosts = tuple(_host(item, _DEFAULT_PORTS[kind]) for item in authority.split(","))
        if kind == "server" and len(hosts) > 1:
            raise ValueError(
                f"{scheme}:// has one host; several are of {base}+sentinel:// or {base}+cluster://"
            )
        if kind == "sentinel":
            service, _, path = path.partition("/")
            if not service:
                raise ValueError(
                    f"a Sentinel URL names its service: {base}+sentinel://host:port/service"
                )
        db = _db(path) if path else db
        if kind == "cluster" and db:
            raise ValueError("a Cluster has no databases: leave the number out of its URL")
    return StoreAddress(
        kind,
        hosts,
        tls,
        username or connection.username,
        password or connection.password,
        socket=f"/{unquote(path)}" if base == "unix" else "",
        service=service,
        db=db,
    )


def redacted(url: str) -> str:
    """The URL without its user and password, for logs and messages. Whatever stands before the last
    ``@`` goes, however the URL is malformed."""
    return _CREDENTIALS.sub(f"{MASK}@", url)


def _check_settings(
    connection: StoreConnection, *, scheme: str, tls: bool, username: str, password: str
) -> None:
    if username and connection.username and username != connection.username:
        raise ValueError("the store URL and username name different users: give one of them")
    if password and (connection.password or connection.password_file is not None):
        raise ValueError(
            "the store URL has a password and there is password or password_file too: give one"
        )
    if not tls and (connection.tls_ca is not None or connection.tls_certificate is not None):
        raise ValueError(
            f"tls_ca and tls_certificate are of a store URL with TLS: rediss…://, not {scheme}://"
        )


def _host(item: str, default_port: int) -> tuple[str, int]:
    """``host``, ``host:port`` or ``[IPv6]:port``."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.%]+)\](?::(\d+))?|([^:\[\]]+)(?::(\d+))?", item)
    if match is None:
        raise ValueError("a store URL has host:port there (several: joined by commas)")
    port = int(match[2] or match[4] or default_port)
    if not 0 < port < 65_536:
        raise ValueError(f"a store URL has a port of 1 to 65535, not {port}")
    return match[1] or match[3], port


def _db(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a store URL ends with the number of a database or without one")
    return int(text)


def _query_db(query: str) -> int:
    """The only thing a query may say; connections are described by settings."""
    found = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(found) - {"db"})
    if unknown:
        raise ValueError(
            f"a store URL has no {unknown[0]!r}: what is not in a URL is a setting"
            " (tls_ca, tls_certificate, tls_key, password_file …)"
        )
    return _db(found.get("db", "0"))
