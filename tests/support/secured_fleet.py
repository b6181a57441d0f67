"""A gateway and workers in this process that speak TLS among each other and ask for API keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
from sessile import ReplicaState, Sessile

from gateway import main as gateway_main
from gateway.config import GatewayConfig
from gateway.security.access import Role
from gateway.security.config import GatewaySecurity, TlsConfig, WorkerSecurity
from gateway.security.keys import PREFIX, edited, new_key
from gateway.telemetry.setup import OFF, Telemetry
from statestore.embedded import embedded_server
from tests.support.certificates import Authority
from workers import main as worker_main
from workers.config import ReplicaSettings, WorkerConfig

READY_S = 20.0


@dataclass
class SecuredFleet:
    """Files in ``directory``; ``agent`` (of tenant acme), ``other`` and ``operator`` are keys."""

    directory: Path
    url: str
    tasks: anyio.abc.TaskGroup
    authority: Authority
    telemetry: Telemetry = OFF
    address: str = ""
    stops: list[anyio.Event] = field(default_factory=list)
    endpoints: list[str] = field(default_factory=list)
    """Of the workers."""
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def key_file(self) -> Path:
        return self.directory / "keys.toml"

    @property
    def audit_file(self) -> Path:
        return self.directory / "audit.jsonl"

    def add_key(self, name: str, tenant: str, role: Role = Role.AGENT) -> str:
        secret, key = new_key(tenant, role, datetime.now(UTC))
        with edited(self.key_file) as keys:
            keys.append(key)
        self.keys[name] = secret
        return secret

    def revoke(self, secret: str) -> None:
        with edited(self.key_file) as keys:
            keys[:] = [key for key in keys if not secret.startswith(f"{PREFIX}{key.id}-")]

    async def start_gateway(self, **security: Any) -> str:
        tls = self.authority.issue("gateway")
        settings: dict[str, Any] = {
            "tls": tls,
            "api_keys": self.key_file,
            "audit_log": self.audit_file,
            **security,
        }
        config = GatewayConfig(
            listen="127.0.0.1:0", redis_url=self.url, security=GatewaySecurity(**settings)
        )
        self.address = await self._start(gateway_main.serve, config)
        return self.address

    async def start_worker(
        self, name: str, tls: TlsConfig | None = None, public_prefixes: Path | None = None
    ) -> str:
        config = WorkerConfig(
            redis_url=self.url,
            replica=ReplicaSettings(name, heartbeat_period_s=0.05),
            engine_options=(("step_ms", "1"), ("eos_probability", "0")),
            security=WorkerSecurity(tls or self.authority.issue(name)),
            public_prefixes=public_prefixes,
        )
        self.endpoints.append(await self._start(worker_main.serve, config))
        return self.endpoints[-1]

    def client(self, name: str, **more: Any) -> Sessile:
        return Sessile(
            self.address, api_key=self.keys[name], tls=self.authority.certificate, **more
        )

    async def ready(self, *names: str) -> None:
        """Until the gateway sees these replicas READY."""
        async with self.client("operator") as client:
            with anyio.fail_after(READY_S):
                while True:
                    replicas = await client.fleet.replicas()
                    up = {r.ref.replica_id for r in replicas if r.state is ReplicaState.READY}
                    if up >= set(names):
                        return
                    await anyio.sleep(0.02)

    async def _start(self, serve: Any, config: Any) -> str:
        stop = anyio.Event()
        self.stops.append(stop)

        async def life(*, task_status: anyio.abc.TaskStatus[str]) -> None:
            await serve(config, stop=stop, telemetry=self.telemetry, task_status=task_status)

        return str(await self.tasks.start(life))


@asynccontextmanager
async def secured_fleet(
    directory: Path,
    *workers: str,
    telemetry: Telemetry = OFF,
    public_prefixes: Path | None = None,
) -> AsyncIterator[SecuredFleet]:
    async with embedded_server() as url, anyio.create_task_group() as tasks:
        fleet = SecuredFleet(directory, url, tasks, Authority(directory / "pki"), telemetry)
        fleet.add_key("agent", "acme")
        fleet.add_key("other", "globex")
        fleet.add_key("operator", "ops", Role.OPERATOR)
        for name in workers:
            await fleet.start_worker(name, public_prefixes=public_prefixes)
        await fleet.start_gateway()
        await fleet.ready(*workers)
        yield fleet
        for stop in fleet.stops:
            stop.set()
