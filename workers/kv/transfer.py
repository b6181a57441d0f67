"""Moving KV pages between replicas: the source gives leave, the target pulls and verifies.

Nothing here owns a session or fails a turn. A transfer that breaks is tried once more and then
given up with the reason; whatever is missing is recomputed. What counts as held is measured after
the pages were verified, never inferred from what was sent (P13, I5).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import anyio
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from gateway.core.errors import (
    InvalidRequest,
    MigrationRefused,
    NotOwner,
    Overloaded,
    SessileError,
)
from gateway.telemetry.metrics import WorkerMetrics
from gateway.telemetry.tracing import Tracing
from statestore.records import Position, ReplicaRef
from workers.engines.port import Engine, PageExport, PageImport, PageMeta, PagesExhausted
from workers.kv.blocks import BLOCK_HASH_BYTES
from workers.residency import ResidentSession

log = logging.getLogger(__name__)

ATTEMPTS = 2
MAX_CONCURRENT_PULLS = 4
"""Pulls at once into this replica; further ones wait for a place within their time limit."""
MAX_WAITING_PULLS = 64
"""Over it a pull is given up at once."""
EXPORTED_SHARE = 0.5
"""Of the pages, how many several exports may hold together; a single one may hold any number, or
large sessions could not move."""
BUSY_RETRY_MS = 1000
MAX_BLOCKS = 1 << 17
"""Blocks one export may be asked for."""
EXPORT_TIMEOUT_S = 5.0
DEFAULT_LEASE_S = 30.0
MAX_LEASE_S = 300.0


class PeerClient(Protocol):
    """Calls to other replicas. Failures are SessileErrors."""

    async def export_kv(
        self, endpoint: str, request: pb.ExportKvRequest, timeout_s: float
    ) -> pb.ExportKvResponse: ...


class TicketIssuer(Protocol):
    """The source's end of the data channel."""

    @property
    def endpoint(self) -> str:
        """host:port for peers."""
        ...

    def issue_ticket(self, export: PageExport, lease_s: float) -> bytes:
        """A one-time secret for these pages. The issuer releases them after use or at the lease's
        end; raises Overloaded at its bound."""
        ...


Puller = Callable[[str, bytes, PageImport, int, int, float], Awaitable[int]]
"""``pull_pages(endpoint, ticket, reservation, pages, page_bytes, timeout_s)`` -> bytes received.
Raises OSError (also for a refused ticket or a broken stream) or TimeoutError."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull achieved. ``pages`` are resident from the context's start, measured after it."""

    pages: int
    bytes_copied: int
    detail: str = ""


def lease_seconds(lease_ms: int) -> float:
    """A requested lease in seconds: the default for 0, bounded by MAX_LEASE_S."""
    return min(lease_ms / 1000 or DEFAULT_LEASE_S, MAX_LEASE_S)


class KvTransfer:
    """Both ends of KV transfer on one replica."""

    def __init__(
        self,
        ref: ReplicaRef,
        engine: Engine,
        tickets: TicketIssuer,
        peers: PeerClient,
        pull_pages: Puller,
        *,
        pull_timeout_s: float = 30.0,
        tracing: Tracing | None = None,
        metrics: WorkerMetrics | None = None,
    ) -> None:
        self._ref = ref
        self._engine = engine
        self._tickets = tickets
        self._peers = peers
        self._pull_pages = pull_pages
        self._pull_timeout_s = pull_timeout_s
        self._tracing = tracing or Tracing("sessile.worker")
        self._metrics = metrics or WorkerMetrics()
        self._limiter = anyio.Semaphore(MAX_CONCURRENT_PULLS)
        self._exports: dict[_CountedExport, int] = {}

    @property
    def takes_pages(self) -> bool:
        """False for an engine whose pages are not for peers."""
        return self._engine.info.page_bytes > 0

    # -- source ---------------------------------------------------------------------------------

    def export(self, request: pb.ExportKvRequest) -> pb.ExportKvResponse:
        """Leave to pull the longest resident run of the wanted blocks. A block's hash contains its
        tenant's salt, so who can name a block may have it."""
        info = self._engine.info
        meant = ReplicaRef(request.source.replica_id, request.source.incarnation)
        if meant != self._ref:
            raise NotOwner(f"this is {self._ref}, not {meant}")
        if request.kv_fingerprint != info.kv_fingerprint:
            raise MigrationRefused("the replicas' KV pages are not exchangeable")
        if len(request.block_hashes) > MAX_BLOCKS:
            raise InvalidRequest(f"an export takes at most {MAX_BLOCKS} blocks")
        if any(len(name) != BLOCK_HASH_BYTES for name in request.block_hashes):
            raise InvalidRequest(f"a block hash has {BLOCK_HASH_BYTES} bytes")
        export = _CountedExport(self._engine.export_pages(request.block_hashes), self._exports)
        if not export.pages:
            export.release()
            return pb.ExportKvResponse(page_bytes=info.page_bytes)
        # After the ticket the channel may release the pages at any time: read them first.
        checksums = [page.checksum for page in export.pages]
        try:
            if sum(self._exports.values()) > max(
                len(checksums), info.capacity_pages * EXPORTED_SHARE
            ):
                raise Overloaded("exports hold their share of KV", retry_after_ms=BUSY_RETRY_MS)
            ticket = self._tickets.issue_ticket(export, lease_seconds(request.lease_ms))
        except BaseException:
            export.release()
            raise
        return pb.ExportKvResponse(
            ticket=ticket,
            data_endpoint=self._tickets.endpoint,
            offered_pages=len(checksums),
            page_bytes=info.page_bytes,
            checksums=checksums,
        )

    # -- target ---------------------------------------------------------------------------------

    async def pull(
        self, resident: ResidentSession, source_endpoint: str, source: ReplicaRef, lease_s: float
    ) -> Pulled:
        """Makes the session's pages resident as far as the source has them, and pins them for
        ``lease_s``. Never raises for a transfer that fails; takes at most the pull timeout."""
        says = {"sessile.source": str(source)}
        with self._tracing.span("pull KV", resident.session_id, says) as span:
            pulled = await self._pull(resident, source_endpoint, source, lease_s)
            span.set(
                {
                    "sessile.kv.pages": pulled.pages,
                    "sessile.kv.bytes": pulled.bytes_copied,
                    "sessile.kv.detail": pulled.detail,
                }
            )
            self._metrics.pulled(pulled.bytes_copied)
            return pulled

    async def _pull(
        self, resident: ResidentSession, source_endpoint: str, source: ReplicaRef, lease_s: float
    ) -> Pulled:
        # Nobody has the KV of a context's last token: it is computed with the next one.
        whole = max(0, len(resident.tokens) - 1) // self._engine.info.page_size
        hashes = resident.block_hashes(self._engine.info)[:whole]
        pin_id = resident.session_id
        if self._limiter.statistics().tasks_waiting >= MAX_WAITING_PULLS:
            detail = f"{MAX_WAITING_PULLS} pulls wait already"
            log.warning("pull of %s from %s: %s", pin_id, source, detail)
            return Pulled(self._engine.pin(pin_id, hashes, lease_s), 0, detail)
        copied, detail, again = 0, "", True
        with anyio.move_on_after(self._pull_timeout_s) as scope:
            async with self._limiter:
                for _ in range(ATTEMPTS):
                    # Pinned first, so that what the pull adds to is not evicted meanwhile.
                    if not again or self._engine.pin(pin_id, hashes, lease_s) >= len(hashes):
                        break
                    received = 0
                    try:
                        received, detail, again = await self._attempt(
                            resident, hashes, source_endpoint, source
                        )
                    except (PagesExhausted, NotOwner, MigrationRefused) as error:
                        detail, again = str(error), False
                    except (SessileError, OSError, TimeoutError) as error:
                        detail = f"{type(error).__name__}: {error}"
                    copied += received
                    if detail:
                        log.warning("pull of %s from %s: %s", pin_id, source, detail)
        if scope.cancelled_caught:
            detail = f"not complete within {self._pull_timeout_s} s"
        return Pulled(self._engine.pin(pin_id, hashes, lease_s), copied, detail)

    async def _attempt(
        self, resident: ResidentSession, hashes: list[bytes], endpoint: str, source: ReplicaRef
    ) -> tuple[int, str, bool]:
        """One pull of what is missing: bytes received, what was amiss, and whether another try can
        help."""
        info = self._engine.info
        have = self._engine.resident_pages(hashes)
        wanted = hashes[have:]
        reservation = self._engine.reserve_import(hashes, have, len(wanted))
        try:
            request = pb.ExportKvRequest(
                session_id=resident.session_id,
                source=_wire(source),
                target=_wire(self._ref),
                kv_fingerprint=info.kv_fingerprint,
                block_hashes=wanted,
                lease_ms=round(self._pull_timeout_s * 1000),
            )
            offer = await self._peers.export_kv(endpoint, request, EXPORT_TIMEOUT_S)
            pages = offer.offered_pages
            if pages > len(wanted) or len(offer.checksums) != pages:
                raise MigrationRefused(f"{source} offers {pages} pages of {len(wanted)}")
            if pages == 0:
                return 0, f"{source} holds none of the {len(wanted)} missing pages", False
            if offer.page_bytes != info.page_bytes:
                raise MigrationRefused(f"{source} has pages of {offer.page_bytes} bytes")
            received = await self._pull_pages(
                offer.data_endpoint,
                offer.ticket,
                reservation,
                pages,
                info.page_bytes,
                self._pull_timeout_s,
            )
            metas = [
                PageMeta(name, checksum)
                for name, checksum in zip(wanted, offer.checksums, strict=False)
            ]
            taken = await reservation.commit(metas)
        finally:
            reservation.release()
        if taken < pages:
            return received, f"{taken} of {pages} pages could be verified", True
        if pages < len(wanted):
            return received, f"{source} holds {pages} of the {len(wanted)} missing pages", False
        return received, "", False

    def verified(self, resident: ResidentSession, pages: int) -> Position:
        """The ledger position that ``pages`` resident pages cover."""
        length = pages * self._engine.info.page_size
        return Position(length, resident.digest_at(length))


class _CountedExport:
    """A PageExport that is in a table, with the number of its pages, until its release."""

    def __init__(self, export: PageExport, table: dict[_CountedExport, int]) -> None:
        self._export = export
        self._table = table
        table[self] = len(export.pages)

    @property
    def pages(self) -> Sequence[PageMeta]:
        return self._export.pages

    def view(self, index: int) -> memoryview:
        return self._export.view(index)

    def release(self) -> None:
        self._table.pop(self, None)
        self._export.release()


def _wire(ref: ReplicaRef) -> types_pb2.ReplicaRef:
    return types_pb2.ReplicaRef(replica_id=ref.replica_id, incarnation=ref.incarnation)
