"""Every metric is exported, by the process that feeds it, with values that what happened explains.

A gateway and two workers in this process over a real store, each with a Prometheus listener."""

from __future__ import annotations

import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from sessile import Sessile, Tokens

from gateway.config import GatewayConfig
from gateway.main import serve as serve_gateway
from gateway.telemetry import instruments
from gateway.telemetry.config import TelemetryConfig
from gateway.telemetry.setup import Telemetry, installed
from statestore.records import Session
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from tests.support.prometheus import exported_names
from tests.support.servers import running_server, valkey_binary
from workers.config import ReplicaSettings, WorkerConfig
from workers.main import serve as serve_worker

pytestmark = pytest.mark.anyio

LISTEN = TelemetryConfig(prometheus_listen="127.0.0.1:0")
OPTIONS = (("step_ms", "10"), ("decode_token_ms", "0"), ("eos_probability", "0"))

Samples = dict[str, list[tuple[dict[str, str], float]]]


@dataclass
class Fleet:
    url: str
    tasks: anyio.abc.TaskGroup
    stack: ExitStack
    gateway: str = ""
    metrics: dict[str, str] = field(default_factory=dict)
    """Where each process serves them."""
    scopes: dict[str, anyio.CancelScope] = field(default_factory=dict)

    def telemetry(self, name: str) -> Telemetry:
        made = installed(LISTEN, "sessile", name, {}, for_libraries=False)
        telemetry = self.stack.enter_context(made)
        self.metrics[name] = telemetry.prometheus_address
        return telemetry

    async def start(self, name: str, serve: Callable[..., Awaitable[None]], config: Any) -> str:
        telemetry, stop = self.telemetry(name), anyio.Event()

        async def process(*, task_status: anyio.abc.TaskStatus[str]) -> None:
            with anyio.CancelScope() as self.scopes[name]:
                await serve(config, stop=stop, telemetry=telemetry, task_status=task_status)

        return str(await self.tasks.start(process))

    async def worker(self, name: str) -> None:
        replica = ReplicaSettings(replica_id=name, heartbeat_period_s=0.1)
        config = WorkerConfig(redis_url=self.url, replica=replica, engine_options=OPTIONS)
        await self.start(name, serve_worker, config)

    async def scrape(self, name: str) -> Samples:
        def read() -> str:
            url = f"http://{self.metrics[name]}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())

        samples: Samples = {}
        for family in text_string_to_metric_families(await anyio.to_thread.run_sync(read)):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return samples


@asynccontextmanager
async def running() -> AsyncIterator[Fleet]:
    with running_server(valkey_binary()) as url, ExitStack() as stack:
        async with anyio.create_task_group() as tasks:
            fleet = Fleet(url, tasks, stack)
            config = GatewayConfig(listen="127.0.0.1:0", redis_url=url)
            fleet.gateway = await fleet.start("gateway", serve_gateway, config)
            for name in ("a", "b"):
                await fleet.worker(name)
            yield fleet
            tasks.cancel_scope.cancel()


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum over what has these labels (``sessile_`` is left out)."""
    wanted = {f"sessile_{key}": value for key, value in labels.items()}
    found = samples.get(name, ())
    return sum(value for has, value in found if wanted.items() <= has.items())


async def live_through_everything(fleet: Fleet) -> str:
    """Two turns, a move, a fencing, lost writes, a fail-over: of seven turns each has its end.
    Returns who is left of the two workers."""
    raw = Redis.from_url(fleet.url)
    store = RedisStore(await connect(fleet.url))

    async def record(session_id: str) -> Session:
        found = await store.get_session(session_id)
        assert found is not None
        return found

    try:
        async with Sessile([fleet.gateway]) as client:
            session = await client.open(system="Be brief.")
            for prompt in ("One. " * 20, "Two."):
                await session.run(prompt, max_tokens=20, ignore_eos=True).result()
            assert (await client.fleet.migrate(session.session_id)).moved

            fenced = False
            async for event in session.run("Three.", max_tokens=60, ignore_eos=True):
                if isinstance(event, Tokens) and not fenced:
                    # As a gateway does that is cut off from the owner.
                    epoch = (await record(session.session_id)).epoch
                    await store.take(session.session_id, epoch, None, b"12345678")
                    fenced = True

            other = await client.open()
            family = f"*{other.session_id.removeprefix('ses_')}*"
            await other.run("One.", max_tokens=8, ignore_eos=True).result()
            kept = [(key, await raw.dump(key)) for key in await raw.keys(family)]
            await other.run("Two.", max_tokens=8, ignore_eos=True).result()
            for key, dump in kept:
                assert dump is not None
                await raw.restore(key, 0, dump, replace=True)
            await other.run("Three.", max_tokens=8, ignore_eos=True).result()

            killed = ""
            async for event in session.run("Four.", max_tokens=60, ignore_eos=True):
                if isinstance(event, Tokens) and not killed:
                    owner = (await record(session.session_id)).owner
                    assert owner is not None
                    killed = owner.replica.replica_id
                    fleet.scopes[killed].cancel()
            return "b" if killed == "a" else "a"
    finally:
        await raw.aclose()
        await store.aclose()


async def at_rest(fleet: Fleet, process: str, *gauges: str) -> Samples:
    """What a process shows once these are at 0: a client hears the end of its turn before the
    gateway is done with the call, and a worker tells of it with its next heartbeat."""
    with anyio.fail_after(20):
        while True:
            samples = await fleet.scrape(process)
            if not any(total(samples, name) for name in gauges):
                return samples
            await anyio.sleep(0.1)


async def test_each_metric_is_exported_with_what_happened() -> None:
    async with running() as fleet:
        left = await live_through_everything(fleet)
        alive = await at_rest(fleet, left, "sessile_turns_running", "sessile_turns_queued")
        gateway = await at_rest(fleet, "gateway", "sessile_streams")
        a, b = await fleet.scrape("a"), await fleet.scrape("b")

    workers: Samples = {}
    for samples in (a, b):
        for name, values in samples.items():
            workers.setdefault(name, []).extend(values)
    for process, table in ((gateway, instruments.GATEWAY), (workers, instruments.WORKER)):
        for instrument in table.values():
            for name in exported_names(instrument):
                assert name in process, f"{instrument.name}: no {name} in {sorted(process)}"
                allowed = {label.replace(".", "_") for label in instrument.attributes} | {"le"}
                for labels, _ in process[name]:
                    assert set(labels) <= allowed, name

    assert total(gateway, "gen_ai_server_request_duration_seconds_count", status="committed") == 7
    assert total(gateway, "gen_ai_server_time_to_first_token_seconds_count") == 7
    ttft = total(gateway, "gen_ai_server_time_to_first_token_seconds_sum")
    assert 0 < ttft < total(gateway, "gen_ai_server_request_duration_seconds_sum")
    assert total(gateway, "sessile_epochs_taken_total", cause="placement") >= 2
    assert total(gateway, "sessile_epochs_taken_total", cause="migration") == 1
    assert total(gateway, "sessile_epochs_taken_total", cause="failover") == 1
    moves = "sessile_migrations_total"
    assert total(gateway, moves, cause="operator", mode="idle_with_kv", outcome="moved") == 1
    assert total(gateway, "sessile_migration_copied_bytes_total") > 0
    assert total(gateway, "sessile_failover_gap_seconds_count", cause="broken") == 1
    assert 0 < total(gateway, "sessile_failover_gap_seconds_sum") < 10
    assert total(gateway, "sessile_replicas") == 2
    assert total(gateway, "sessile_replicas", state="ready") >= 1
    assert total(gateway, "sessile_streams") == 0

    assert total(workers, "sessile_turns_total", status="committed") == 7
    output = total(workers, "sessile_tokens_total", kind="output")
    # What the killed one wrote last is in the ledger, but it did not live to count it: of a turn of
    # 60 tokens one group commit, which is the larger the slower the store is.
    written = 20 + 20 + 60 + 3 * 8 + 60
    assert written - 30 <= output <= written
    assert total(workers, "sessile_tokens_total", kind="cached") > 0
    assert total(workers, "sessile_tokens_total", kind="computed") > 0
    assert total(workers, "sessile_prompt_cached_ratio_count") >= 8
    assert total(workers, "sessile_inter_token_time_seconds_count") > 50
    assert total(workers, "gen_ai_server_time_per_output_token_seconds_count") == 7
    assert total(workers, "sessile_writes_fenced_total", write="append") == 1
    assert total(workers, "sessile_repairs_total") >= 1
    assert total(workers, "sessile_ledger_written_bytes_total") > 4 * output
    assert total(alive, "sessile_ledger_held_bytes") > 0
    assert total(alive, "sessile_sessions_held") >= 1
    assert total(alive, "sessile_kv_pages", state="used") == 0
    assert total(alive, "sessile_kv_pages", state="free") > 0
    assert total(alive, "sessile_kv_pinned") > 0
    assert total(workers, "sessile_kv_pulled_bytes_total") > 0
    commits = total(workers, "sessile_group_commit_duration_seconds_count")
    assert total(workers, "sessile_group_commit_appends_sum") >= commits > 50
