"""The stores under test: one server, a primary and its replica under Sentinel, a Cluster."""

from __future__ import annotations

import random
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import redis.asyncio as aioredis
from redis.asyncio import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError

from statestore.scripts import load_script, script_names
from tests.faults.children import START_TIMEOUT_S, Child
from tests.faults.proof import Unproven, until
from tests.faults.proxy import Proxy
from tests.support.servers import redis_binary

DOWN_AFTER_MS = 500
_GIVEN: set[int] = set()
"""Ports that processes of this one's fleets may come back to."""


def free_port() -> int:
    """A port of the loopback interface for several processes after each other: outside the range
    from which the kernel draws ports of outgoing connections, and given out once."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        port = random.randrange(min(10_000, first // 2), min(32_000, first))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port
    raise OSError("no port is free")


def client_of(port: int, *, retries: int = 0) -> Any:
    """A plain client."""
    retry = Retry(ConstantBackoff(0.05), retries)
    return aioredis.Redis(host="127.0.0.1", port=port, retry=retry, socket_timeout=5.0)


@dataclass
class RedisServer:
    """One Redis process and its data, which survive a restart."""

    name: str
    directory: Path
    options: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    """A configuration file and what follows it; a Sentinel's."""
    port: int = field(default_factory=free_port)
    started: list[Child] = field(default_factory=list)
    """Its processes so far; the last one is the present one."""

    async def start(self, *extra: str) -> None:
        self.directory.mkdir(exist_ok=True)
        command = [redis_binary(), *self.config, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.directory), *self.options, *extra]
        if not self.config:
            command += ["--save", ""]
        command += ["--logfile", str(self.directory / "redis.log")]
        self.started.append(Child(self.name, command, self.directory / "stderr.log"))
        await self.answers()

    async def answers(self) -> None:
        """Until it has loaded its data and answers."""
        client = client_of(self.port)
        try:
            with anyio.fail_after(START_TIMEOUT_S):
                while True:
                    try:
                        await client.ping()
                        return
                    except (RedisError, OSError):
                        await anyio.sleep(0.01)
        finally:
            await client.aclose()

    @property
    def process(self) -> Child:
        return self.started[-1]

    def aof(self) -> Path:
        """The file that is appended to now."""
        return max((self.directory / "appendonlydir").glob("*.incr.aof"))


class Store(ABC):
    """What the fleet's processes and the checks use as their store."""

    def __init__(self) -> None:
        self.servers: list[RedisServer] = []
        self.url_for_checks = ""
        """Without a proxy; known once it is started."""
        self._raw: Any = None

    @abstractmethod
    async def start(self, proxy: Proxy, directory: Path) -> None:
        """Starts the servers, with a link of the proxy before each where faults need one."""

    @abstractmethod
    def url(self, proxy: Proxy, process: str) -> str:
        """For one process of the fleet."""

    @abstractmethod
    def primaries(self) -> list[RedisServer]:
        """The servers that hold the keys, each its own."""

    @property
    def raw(self) -> Any:
        """A plain client, without a proxy, for checks."""
        assert self._raw is not None, "the store is not started"
        return self._raw

    async def aclose(self) -> None:
        """Ends every server, also after a start that broke off."""
        if self._raw is not None:
            await self._raw.aclose()
        for server in self.servers:
            if server.started:
                server.process.judge_its_end()
                server.process.wake()
                server.process.kill()
                await server.process.ended()


class SingleStore(Store):
    """One server with an append-only file; every process has a link of its own to it."""

    def __init__(self, fsync: str = "everysec") -> None:
        super().__init__()
        self._fsync = fsync

    async def start(self, proxy: Proxy, directory: Path) -> None:
        options = ("--appendonly", "yes", "--appendfsync", self._fsync, "--aof-load-truncated")
        self.server = RedisServer("redis", directory / "redis", (*options, "yes"))
        self.servers = [self.server]
        await self.server.start()
        self.url_for_checks = f"redis://127.0.0.1:{self.server.port}"
        self._raw = client_of(self.server.port, retries=20)
        # So that a write that arrives late is judged by its script, and not for being unknown.
        for name in script_names():
            await self._raw.script_load(load_script(name).source)

    def url(self, proxy: Proxy, process: str) -> str:
        name = f"redis:{process}"
        link = proxy.links.get(name)
        if link is None:
            link = proxy.add(name, ("127.0.0.1", 0), ("127.0.0.1", self.server.port), resp=True)
        return f"redis://{link.endpoint}"

    def primaries(self) -> list[RedisServer]:
        return self.servers


class SentinelStore(Store):
    """A primary, a replica and a Sentinel. Servers are known by addresses of proxies, so that the
    replica can be kept behind."""

    async def start(self, proxy: Proxy, directory: Path) -> None:
        self.proxy = proxy
        for index, name in enumerate(("a", "b")):
            server = RedisServer(f"store-{name}", directory / name)
            address = f"127.0.3.{1 + index}", server.port
            proxy.add(f"store:{name}", address, ("127.0.0.1", server.port), resp=True)
            server.options = ("--appendonly", "no", "--repl-diskless-sync-delay", "0",
                              "--replica-announce-ip", address[0])  # fmt: skip
            self.servers.append(server)
        self.primary, self.replica = self.servers
        await self.primary.start()
        await self.replica.start(*self._follow(self.primary))
        self._sentinel = RedisServer("sentinel", directory / "sentinel")
        self._sentinel.directory.mkdir()
        config = self._sentinel.directory / "sentinel.conf"
        host, port = self._address(self.primary)
        config.write_text(
            f"sentinel monitor main {host} {port} 1\n"
            f"sentinel down-after-milliseconds main {DOWN_AFTER_MS}\n"
            "sentinel failover-timeout main 3000\n"
        )
        self._sentinel.config = (str(config), "--sentinel")
        self.servers.append(self._sentinel)
        await self._sentinel.start()
        self.url_for_checks = f"redis+sentinel://127.0.0.1:{self._sentinel.port}/main"
        self._raw = client_of(self.primary.port, retries=20)
        await self.in_sync()

    def url(self, proxy: Proxy, process: str) -> str:
        return self.url_for_checks

    def _address(self, server: RedisServer) -> tuple[str, int]:
        return self.proxy.links[f"store:{server.name[-1]}"].address

    def _follow(self, primary: RedisServer) -> list[str]:
        host, port = self._address(primary)
        return ["--replicaof", f"{host} {port}"]

    def primaries(self) -> list[RedisServer]:
        return [self.primary]

    async def in_sync(self) -> None:
        """Until the replica has all that the primary had a moment before, and Sentinel knows it.
        Which is which Sentinel decides: on a busy machine it may have promoted once more."""
        seen: dict[str, object] = {}

        async def same() -> bool:
            ours = await _replication(self.primary)
            theirs = await _replication(self.replica)
            flags = await self._flags()
            seen.update(primary=ours, replica=theirs, sentinel=flags)
            if (ours["role"], theirs["role"]) == ("slave", "master"):
                await self._exchange()
                return False
            return bool(
                theirs.get("master_link_status") == "up"
                and ours["connected_slaves"] == 1
                # Writes go on meanwhile: the replica's offset is the later one.
                and ours["master_repl_offset"] <= theirs["slave_repl_offset"]
                and b"slave" in flags
            )

        try:
            await until(same, "the replica does not catch up")
        except Unproven as error:
            raise Unproven(f"{error}; last seen: {seen}") from None

    async def _flags(self) -> list[bytes]:
        """What Sentinel says of the replicas that it knows."""
        sentinel = client_of(self._sentinel.port)
        try:
            known = await sentinel.execute_command("SENTINEL", "REPLICAS", "main")
        finally:
            await sentinel.aclose()
        return [_flag(entry) for entry in known]

    async def promoted(self) -> bool:
        """Sentinel has made the replica the primary, and says so to everybody."""
        sentinel = client_of(self._sentinel.port)
        try:
            host, port = await sentinel.execute_command(
                "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"
            )
        finally:
            await sentinel.aclose()
        return (host.decode(), int(port)) == tuple(self._address(self.replica))

    async def swap(self) -> None:
        """The old primary is gone and the replica was promoted: they change roles."""
        await self._exchange()
        await self.replica.start(*self._follow(self.primary))

    async def _exchange(self) -> None:
        self.primary, self.replica = self.replica, self.primary
        await self._raw.aclose()
        self._raw = client_of(self.primary.port, retries=20)


async def _replication(server: RedisServer) -> dict[str, Any]:
    client = client_of(server.port)
    try:
        return dict(await client.info("replication"))
    finally:
        await client.aclose()


def _flag(entry: Any) -> bytes:
    fields = dict(zip(entry[::2], entry[1::2], strict=False)) if isinstance(entry, list) else entry
    flags = fields.get(b"flags", fields.get("flags", b""))
    return flags if isinstance(flags, bytes) else str(flags).encode()


class ClusterStore(Store):
    """Three primaries; clients reach them directly."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Any] = []

    async def start(self, proxy: Proxy, directory: Path) -> None:
        for index in range(3):
            server = RedisServer(f"node-{index}", directory / f"node{index}")
            server.options = ("--cluster-enabled", "yes", "--cluster-announce-ip", "127.0.0.1",
                              "--cluster-port", str(free_port()),
                              "--cluster-node-timeout", "5000")  # fmt: skip
            self.servers.append(server)
            await server.start()
        self.nodes = [client_of(server.port) for server in self.servers]
        share = -(-16384 // len(self.nodes))
        first = self.servers[0]
        for index, node in enumerate(self.nodes):
            last = min((index + 1) * share, 16384) - 1
            await node.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            await node.execute_command("CLUSTER", "ADDSLOTSRANGE", index * share, last)
            if index:
                bus = first.options[first.options.index("--cluster-port") + 1]
                await node.execute_command("CLUSTER", "MEET", "127.0.0.1", first.port, bus)

        async def formed() -> bool:
            states = [await node.execute_command("CLUSTER", "INFO") for node in self.nodes]
            return all(
                b"cluster_state:ok" in reply_bytes(state)
                and b"cluster_known_nodes:3" in reply_bytes(state)
                for state in states
            )

        await until(formed, "the cluster does not form")
        self.url_for_checks = "redis+cluster://" + ",".join(
            f"127.0.0.1:{server.port}" for server in self.servers
        )
        self._raw = RedisCluster(host="127.0.0.1", port=first.port)

    def url(self, proxy: Proxy, process: str) -> str:
        return self.url_for_checks

    def primaries(self) -> list[RedisServer]:
        return self.servers

    async def aclose(self) -> None:
        for node in self.nodes:
            await node.aclose()
        await super().aclose()


def reply_bytes(reply: Any) -> bytes:
    """A reply whose form depends on the client."""
    if isinstance(reply, dict):
        return b"\n".join(f"{name}:{value}".encode() for name, value in reply.items())
    return reply if isinstance(reply, bytes) else str(reply).encode()
