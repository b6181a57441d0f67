"""A rolling restart under load: every process is told to end and is replaced, one after the other,
and no turn fails, loses a token or repeats one."""

from __future__ import annotations

import signal
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from anyio.abc import TaskStatus
from redis import Redis
from sessile import Accepted, Sessile, TurnResult, TurnStatus

from gateway.cli.launch import Child, Cluster
from tests.support.patience import PATIENT
from workers.engines.port import Sampling
from workers.engines.sim.model import expected_output

SESSIONS = 8
TOKENS = 100
LONG_TURN_TOKENS = 1500
"""Of the turn that is handed over for certain: it runs while its replica is told to end."""
TOOL_GAP_S = 0.5
"""Between an agent's turns: processes end while some sessions run and others are idle."""
EXIT_TIMEOUT_S = 30.0
ENVIRONMENT = {**PATIENT, "SESSILE_WORKER__REPLICA__DRAIN_GRACE_S": "15"}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def cluster(anyio_backend: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    options = {"eos_probability": "0"}
    async with Cluster(
        log_directory=tmp_path, engine_options=options, environment=ENVIRONMENT
    ) as fleet:
        await fleet.start(gateways=2, workers=3)
        yield fleet


@dataclass
class Load:
    """Agents, each with a session of its own."""

    client: Sessile
    said: dict[str, list[TurnResult]] = field(default_factory=dict)
    """Session -> its turns, as received."""
    over: bool = False

    async def agent(self) -> None:
        session = await self.client.open(system="count")
        turns = self.said[session.session_id] = []
        while not self.over:
            result = await session.run("go", max_tokens=TOKENS).result()
            check_complete(result, TOKENS)
            turns.append(result)
            await anyio.sleep(TOOL_GAP_S)

    async def long_turn(self, *, task_status: TaskStatus[str]) -> None:
        """A turn that is started with the id of the replica that runs it."""
        session = await self.client.open(system="count")
        turn = session.run("go", max_tokens=LONG_TURN_TOKENS)
        async with aclosing(aiter(turn)) as events:
            async for event in events:
                if isinstance(event, Accepted):
                    task_status.started(event.replica.replica_id)
        result = await turn.result()
        check_complete(result, LONG_TURN_TOKENS)
        assert result.moves > 0, "it was handed over while it ran"
        self.said[session.session_id] = [result]


def check_complete(result: TurnResult, tokens: int) -> None:
    assert result.status is TurnStatus.COMMITTED, result
    assert len(result.token_ids) == tokens, result


def check(session_id: str, turns: Sequence[TurnResult], ledger: Sequence[int]) -> None:
    """What was received is what the ledger has and what an undisturbed engine would have said: the
    sim engine's tokens are hashes of the whole context, so a token that was lost, repeated or put
    in another place would have changed all that followed."""
    for turn in turns:
        end, count = turn.end.length, len(turn.token_ids)
        assert tuple(ledger[end - count : end]) == turn.token_ids, session_id
        expected = expected_output(ledger[: end - count], count, Sampling(), 0.0)
        assert tuple(expected) == turn.token_ids, session_id
    assert turns[-1].end.length == len(ledger)


async def told_to_end(child: Child) -> None:
    child.kill(signal.SIGTERM)
    with anyio.fail_after(EXIT_TIMEOUT_S):
        while child.running:  # noqa: ASYNC110 - nobody tells when a child ends
            await anyio.sleep(0.02)
    assert child.exit_code == 0, child.log_tail()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.anyio
async def test_every_process_is_replaced_under_load_and_no_turn_fails(cluster: Cluster) -> None:
    # A gateway's replacement has its address: the agents know no other.
    async with Sessile(cluster.targets) as client:
        load = Load(client)
        async with anyio.create_task_group() as tasks:
            for _ in range(SESSIONS):
                tasks.start_soon(load.agent)
            busy = await tasks.start(load.long_turn)
            for worker in sorted(cluster.workers, key=lambda worker: worker.name != busy):
                await told_to_end(worker)
                assert "ends with" not in worker.log_tail(), "its sessions were moved before"
                await cluster.start_worker(worker.name)
                await cluster.wait_ready()
            for gateway in cluster.gateways:
                await told_to_end(gateway)
                await cluster.start_gateway(gateway.address)
                await cluster.wait_ready()
            load.over = True
    with Redis.from_url(cluster.redis_url) as raw:
        for session_id, turns in load.said.items():
            assert turns
            data = raw.get(f"sessile:{{{session_id.removeprefix('ses_')}}}:l:{session_id}")
            assert isinstance(data, bytes)
            check(session_id, turns, struct.unpack(f"<{len(data) // 4}I", data))
