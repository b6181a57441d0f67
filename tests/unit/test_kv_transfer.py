"""Bounds of KV transfer: on what is held for peers, and on the pulls that wait."""

from __future__ import annotations

import anyio
import pytest
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from gateway.core.errors import Overloaded
from tests.support.replica_world import SESSION, RunningReplica, World, in_virtual_time, world
from tests.support.replica_world import listen as heard_of
from workers.engines.sim.config import SimConfig, SimTiming
from workers.kv.transfer import (
    MAX_CONCURRENT_PULLS,
    MAX_WAITING_PULLS,
    KvTransfer,
    Pulled,
)
from workers.residency import ResidentSession

SMALL = SimConfig(
    page_size=8,
    capacity_pages=32,
    max_context_tokens=256,
    eos_probability=0,
    timing=SimTiming(step_ms=10),
)


async def with_a_session(w: World) -> RunningReplica:
    replica = await w.start("r1")
    await w.open(leading="Be brief, be quick, and be exact in whatever you say to me here.")
    await w.give(replica)
    await heard_of(replica, await w.request(replica, "Say something long.", "t1"))
    return replica


def resident(replica: RunningReplica) -> ResidentSession:
    found = replica.app._ports.residency.get(SESSION)
    assert found is not None
    return found


@in_virtual_time
async def test_exports_together_hold_a_share_of_the_pages() -> None:
    async with world(SMALL) as w:
        replica = await with_a_session(w)
        info = replica.engine.info
        hashes = resident(replica).block_hashes(info)
        request = pb.ExportKvRequest(
            session_id=SESSION,
            source=types_pb2.ReplicaRef(
                replica_id=replica.ref.replica_id, incarnation=replica.ref.incarnation
            ),
            kv_fingerprint=info.kv_fingerprint,
            block_hashes=hashes,
        )
        first = await replica.app.export_kv(request)
        assert info.capacity_pages / 4 < first.offered_pages <= len(hashes)
        with pytest.raises(Overloaded) as refused:
            await replica.app.export_kv(request)
        assert refused.value.retry_after_ms
        del request.block_hashes[1:]
        assert (await replica.app.export_kv(request)).offered_pages == 1
        while w.channel.exports:
            w.channel.exports.popitem()[1].release()
        request.block_hashes[:] = hashes
        again = await replica.app.export_kv(request)
        assert again.offered_pages == first.offered_pages
        w.channel.exports.popitem()[1].release()


@in_virtual_time
async def test_a_pull_too_many_is_given_up_at_once() -> None:
    async with world() as w:
        replica = await with_a_session(w)
        session = resident(replica)

        class Silent:
            async def export_kv(
                self, endpoint: str, request: pb.ExportKvRequest, timeout_s: float
            ) -> pb.ExportKvResponse:
                await anyio.sleep(timeout_s)
                raise TimeoutError

        transfer = KvTransfer(replica.ref, replica.engine, w.channel, Silent(), w.channel.pull)
        other = ResidentSession("ses_other", b"other" * 7, session.digest.copy())
        other.tokens.extend(session.tokens)
        ended: list[Pulled] = []

        async def pull() -> None:
            ended.append(await transfer.pull(other, "r1:1", replica.ref, 1.0))

        async with anyio.create_task_group() as tasks:
            for _ in range(MAX_CONCURRENT_PULLS + MAX_WAITING_PULLS + 1):
                tasks.start_soon(pull)
            await anyio.sleep(0.01)
            assert [pulled.detail for pulled in ended] == [
                f"{MAX_WAITING_PULLS} pulls wait already"
            ]
            tasks.cancel_scope.cancel()
