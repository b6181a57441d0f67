"""Calls of replicas over the simulated network."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from sessile.v1 import replica_pb2 as pb

from loadtest.simulation.network.call import Call
from loadtest.simulation.network.network import Network


class SimReplicaClient:
    """Implements ``gateway.app.ports.ReplicaClient`` and the workers' peer calls."""

    def __init__(self, network: Network, endpoint: str) -> None:
        self._network = network
        self._endpoint = endpoint

    async def dispatch_turn(
        self, request: pb.DispatchTurnRequest, timeout_s: float
    ) -> AsyncGenerator[bytes, None]:
        sent, network = request.SerializeToString(), self._network
        if network.on_dispatch is not None:
            network.on_dispatch(request, self._endpoint)

        async def handler(app: Any, call: Call) -> None:
            stream = app.dispatch_turn(pb.DispatchTurnRequest.FromString(sent))
            try:
                async for message in stream:
                    if network.on_stream is not None:
                        network.on_stream(request, message)
                    await call.put(message.SerializeToString())
            finally:
                await stream.aclose()

        messages = network.stream(self._endpoint, handler, timeout_s, repeatable=True)
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()

    async def _call(self, name: str, request: Any, timeout_s: float) -> Any:
        kind, sent = type(request), request.SerializeToString()

        async def answer(app: Any) -> Any:
            response = await getattr(app, name)(kind.FromString(sent))
            return type(response).FromString(response.SerializeToString())

        return await self._network.unary(self._endpoint, answer, timeout_s, repeatable=True)

    async def stop_turn(self, request: pb.StopTurnRequest, timeout_s: float) -> Any:
        return await self._call("stop_turn", request, timeout_s)

    async def hand_over(self, request: pb.HandOverRequest, timeout_s: float) -> Any:
        return await self._call("hand_over", request, timeout_s)

    async def abort_hand_over(self, request: pb.AbortHandOverRequest, timeout_s: float) -> Any:
        return await self._call("abort_hand_over", request, timeout_s)

    async def import_session(self, request: pb.ImportSessionRequest, timeout_s: float) -> Any:
        return await self._call("import_session", request, timeout_s)

    async def release_session(self, request: pb.ReleaseSessionRequest, timeout_s: float) -> Any:
        return await self._call("release_session", request, timeout_s)

    async def read_turns(self, request: pb.ReadTurnsRequest, timeout_s: float) -> Any:
        return await self._call("read_turns", request, timeout_s)

    async def set_draining(self, request: pb.SetDrainingRequest, timeout_s: float) -> Any:
        return await self._call("set_draining", request, timeout_s)

    async def export_kv(self, request: pb.ExportKvRequest, timeout_s: float) -> Any:
        return await self._call("export_kv", request, timeout_s)


@dataclass(frozen=True)
class SimReplicaClients:
    """Implements ``gateway.app.ports.ReplicaClients`` and ``workers.kv.transfer.PeerClient``."""

    network: Network

    def at(self, endpoint: str) -> SimReplicaClient:
        return SimReplicaClient(self.network, endpoint)

    async def export_kv(
        self, endpoint: str, request: pb.ExportKvRequest, timeout_s: float
    ) -> pb.ExportKvResponse:
        response: pb.ExportKvResponse = await self.at(endpoint).export_kv(request, timeout_s)
        return response
