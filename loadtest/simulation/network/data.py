"""The KV data channel between simulated replicas."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio

from loadtest.simulation.loop import Process, current_process

if TYPE_CHECKING:
    from loadtest.simulation.network.network import Network

STOPPED_POLL_S = 0.05
PAGE_S = 0.000_05
"""One KV page."""
SLOW_PAGE = 0.05
"""Of a slow process's delay, how much one of its pages takes at most."""


class KvPort:
    """One replica's end of the data channel: a TicketIssuer (see workers/kv/transfer.py)."""

    def __init__(self, endpoint: str, process: Process) -> None:
        self.endpoint = endpoint
        self.process = process
        self._exports: dict[bytes, Any] = {}
        self._issued = 0

    def issue_ticket(self, export: Any, lease_s: float) -> bytes:
        self._issued += 1
        ticket = self._issued.to_bytes(16, "big")
        self._exports[ticket] = export

        def expire() -> None:
            unused = self.claim(ticket)
            if unused is not None:
                unused.release()

        asyncio.get_running_loop().call_later(lease_s, expire)
        return ticket

    def claim(self, ticket: bytes) -> Any:
        """The export of an unused ticket, or None. The caller releases it."""
        return self._exports.pop(ticket, None)


class DataChannel:
    """All replicas' ends, as far as the network lets them hear each other."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._ports: dict[str, KvPort] = {}
        self._pulling: dict[Any, tuple[Process | None, Process]] = {}
        """Exports that are being read -> by whom, and whose they are."""

    def listen(self, port: KvPort) -> None:
        """From now on the port can be asked."""
        self._ports[port.endpoint] = port

    def hang_up(self, process: Process) -> None:
        """The process is gone: what it reads is let go."""
        for export, (target, source) in self._pulling.items():
            if target is process:
                source.run(export.release)

    async def pull(
        self,
        endpoint: str,
        ticket: bytes,
        reservation: Any,
        pages: int,
        page_bytes: int,
        timeout_s: float,
    ) -> int:
        """A Puller (see workers/kv/transfer.py)."""
        with anyio.fail_after(timeout_s):
            return await self._pull(endpoint, ticket, reservation, pages, page_bytes)

    async def _pull(
        self, endpoint: str, ticket: bytes, reservation: Any, pages: int, page_bytes: int
    ) -> int:
        target = current_process()
        await anyio.sleep(self._network.draw_delay())
        port = self._ports.get(endpoint)
        if port is None or self._network.is_gone(port.process):
            raise ConnectionRefusedError(f"nobody listens at {endpoint}")
        await self._answering(target, port.process)
        export = port.claim(ticket)
        if export is None:
            raise ConnectionResetError("the ticket was refused")
        self._pulling[export] = (target, port.process)
        try:
            for index in range(pages):
                slowest_s = max(self._slowness(target), self._slowness(port.process))
                await anyio.sleep(PAGE_S + SLOW_PAGE * slowest_s * self._network.draw.random())
                await self._answering(target, port.process)
                reservation.buffer(index)[:] = export.view(index)
                if self._network.on_page is not None:
                    self._network.on_page(target, port.process, export, reservation, index)
                if self._network.draw.random() < self._network.corrupt_page_rate:
                    reservation.arrived_wrong(index)
                    reservation.buffer(index)[self._network.draw.randrange(page_bytes)] ^= 0x10
        except BaseException:
            reservation.broken = True
            raise
        finally:
            del self._pulling[export]
            port.process.run(export.release)
        return pages * page_bytes

    def _slowness(self, process: Process | None) -> float:
        return 0.0 if process is None else self._network.slowness_s.get(process.name, 0.0)

    async def _answering(self, target: Process | None, source: Process) -> None:
        await self._network.reachable(target, source)
        await self._network.reachable(source, target)
        while source.stopped and not self._network.is_gone(source):  # noqa: ASYNC110 - no signal comes
            await anyio.sleep(STOPPED_POLL_S)
        if self._network.is_gone(source):
            raise ConnectionResetError("connection reset")
