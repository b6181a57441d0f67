"""What a process says of itself in ``grpc.health.v1``: that it lives, and whether it is ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import anyio
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from gateway.rpc.requests import OpenServices

LIVENESS = "liveness"
"""SERVING for as long as the process answers; all other names are about readiness."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The health service of one process, for the name ``""`` and those of its services."""

    def __init__(self, *services: str) -> None:
        self._names = ("", *services)
        self._service = health.HealthServicer()
        self._told: bool | None = None

    async def add_to(self, server: aio.Server | OpenServices) -> None:
        """It lives, and is not ready."""
        health_pb2_grpc.add_HealthServicer_to_server(self._service, cast(Any, server))
        await self._service.set(LIVENESS, _SERVING)
        await self.tell(ready=False)

    async def tell(self, *, ready: bool) -> None:
        """Whether the process is to be sent new work from now on."""
        if ready is not self._told:
            self._told = ready
            for name in self._names:
                await self._service.set(name, _SERVING if ready else _NOT_SERVING)

    async def follow(self, ready: Callable[[], bool], period_s: float) -> None:
        """Tells what ``ready`` says every ``period_s`` seconds, until cancelled."""
        while True:
            await self.tell(ready=ready())
            await anyio.sleep(period_s)
