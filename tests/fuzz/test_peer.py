"""A replica pulls KV from a peer that lies, in its answer and on the data channel: the turn runs as
if there had been no peer, and nothing of the lie stays in the cache."""

from __future__ import annotations

import random
from typing import Any

import anyio
from hypothesis import given
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from gateway.core.errors import Overloaded, Unavailable
from loadtest.simulation.loop import run
from tests.fuzz.hostile import Hostile, seeds
from tests.fuzz.profile import fuzz
from tests.support.replica_world import SESSION, TENANT, listen, world

ANSWER_S = 0.01


class Liar:
    """The peer's control call and its data channel."""

    endpoint = "liar"

    def __init__(self, hostile: Hostile, wanted_pages: int, page_bytes: int) -> None:
        self._hostile = hostile
        self._wanted_pages = wanted_pages
        self._page_bytes = page_bytes

    async def export_kv(
        self, endpoint: str, request: pb.ExportKvRequest, timeout_s: float
    ) -> pb.ExportKvResponse:
        del endpoint, timeout_s
        draw = self._hostile.draw
        await anyio.sleep(ANSWER_S)
        if draw.random() < 0.1:
            raise draw.choice((Unavailable("gone"), Overloaded("full", retry_after_ms=1)))
        answer = self._hostile.message(pb.ExportKvResponse)
        if draw.random() < 0.7:
            pages = draw.choice((len(request.block_hashes), 1))
            answer.offered_pages = pages
            answer.page_bytes = self._page_bytes
            del answer.checksums[:]
            answer.checksums.extend(draw.getrandbits(64) for _ in range(pages))
        return answer

    def issue_ticket(self, export: Any, lease_s: float) -> bytes:
        raise AssertionError("nobody asks the target for pages")

    async def pull(
        self,
        endpoint: str,
        ticket: bytes,
        reservation: Any,
        pages: int,
        page_bytes: int,
        timeout_s: float,
    ) -> int:
        del endpoint, ticket, timeout_s
        draw = self._hostile.draw
        for index in range(draw.randrange(pages + 1)):
            reservation.buffer(index)[:] = draw.randbytes(page_bytes)
            await anyio.sleep(ANSWER_S)
        if draw.random() < 0.3:
            raise draw.choice((ConnectionResetError("broke"), TimeoutError("stalled")))
        return pages * page_bytes


async def second_turn(seed: int | None) -> list[int]:
    """Tokens of a session's second turn, on a replica that holds nothing of the first. With a seed
    it is told to pull the prefix from a liar."""
    async with world() as made:
        first = await made.start("r1")
        await made.open()
        await made.give(first)
        await listen(first, await made.request(first, "Say something long.", "t1"))
        if seed is not None:
            info = first.engine.info
            liar = Liar(Hostile(seed), 8, info.page_bytes)
            made.channel = liar  # type: ignore[assignment]
            made.export_kv = liar.export_kv  # type: ignore[method-assign]
        second = await made.start("r2")
        await made.give(second)
        request = await made.request(second, "Go on.", "t2")
        if seed is not None:
            if random.Random(seed).random() < 0.5:
                await imported(made, second)
            request.prefix.source_endpoint = "r1:1"
            request.prefix.source.replica_id = "r1"
            request.prefix.source.incarnation = first.ref.incarnation
        heard = await listen(second, request)
        assert heard.events[-1].finished.status == types_pb2.TURN_STATUS_COMMITTED
        second.engine.check_integrity()
        assert not made.failures
        return heard.tokens


async def imported(made: Any, replica: Any) -> None:
    """As a migration would have it; nothing of a lie may count as verified."""
    session = await made.session()
    answer = await replica.app.import_session(
        pb.ImportSessionRequest(
            session_id=SESSION,
            source_endpoint="r1:1",
            source=types_pb2.ReplicaRef(replica_id="r1", incarnation=1),
            up_to=types_pb2.Position(length=session.head.length, digest=session.head.digest),
            tenant=TENANT,
        )
    )
    assert answer.verified.length == 0
    assert answer.pages == 0
    assert answer.detail


@fuzz(60)
@given(seeds)
def test_a_lying_peer_changes_no_token_and_leaves_nothing(seed: int) -> None:
    told: list[list[int]] = []

    async def main() -> None:
        told.append(await second_turn(None))
        told.append(await second_turn(seed))

    run(main, seed=1)
    assert told[0] == told[1]
