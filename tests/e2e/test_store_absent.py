"""Real processes on a Redis with TLS, users and an append-only file, that comes late and dies in
mid-turn."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sessile import RetryPolicy, Sessile, Tokens, TurnStatus, Unavailable

from gateway import main as gateway_main
from gateway.cli.launch import Child, Cluster, LaunchFailed
from gateway.config import GatewayConfig
from gateway.rpc.health import LIVENESS
from tests.support.servers import free_port, redis_binary
from tests.support.store_servers import Certificates, StoreServer, users_file
from workers import main as worker_main
from workers.config import ReplicaSettings, WorkerConfig

pytestmark = pytest.mark.anyio

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
TOKENS = 150


def password(name: str) -> str:
    return f"password-of-{name}"


@pytest.fixture
async def store(tmp_path: Path, anyio_backend: str) -> AsyncIterator[StoreServer]:
    """Ready to start; its files and settings are in ``tmp_path``."""
    certificates = Certificates.made(tmp_path)
    options = [
        *certificates.options(clients=True),
        *("--aclfile", str(users_file(tmp_path, password))),
        *("--appendonly", "yes", "--appendfsync", "always"),
    ]
    with StoreServer(redis_binary(), options, tls=True) as server:
        server.kill()
        yield server


def settings(directory: Path, **more: str) -> dict[str, str]:
    """Environment of the processes."""
    common = {
        "tls_ca": str(directory / "ca.pem"),
        "tls_certificate": str(directory / "client.pem"),
        "tls_key": str(directory / "client-key.pem"),
        **more,
    }
    users = {
        f"SESSILE_{process.upper()}__REDIS__{name}": value.format(f"sessile-{process}")
        for process in ("gateway", "worker")
        for name, value in (("USERNAME", "{}"), ("PASSWORD", password("{}")))
    }
    return {
        f"SESSILE_COMMON__REDIS__{name.upper()}": value for name, value in common.items()
    } | users


async def health(address: str, service: str = "") -> int:
    async with aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await stub.Check(request, timeout=10, wait_for_ready=True)
        return int(answer.status)


async def logged(child: Child, text: str) -> None:
    with anyio.fail_after(60):
        while text not in child.log.read_text(errors="replace"):  # noqa: ASYNC110
            await anyio.sleep(0.02)


async def test_a_store_that_comes_late_and_dies_in_mid_turn_is_waited_for(
    store: StoreServer, tmp_path: Path
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    options = {"step_ms": "10", "decode_token_ms": "0", "eos_probability": "0"}
    fleet = Cluster(
        engine_options=options,
        redis_url=store.url,
        log_directory=tmp_path / "logs",
        environment=settings(tmp_path),
    )
    async with fleet, anyio.create_task_group() as tasks:

        async def start() -> None:
            await fleet.start(gateways=1, workers=1, listen=listen)
            started.set()

        started = anyio.Event()
        tasks.start_soon(start)
        with anyio.fail_after(60):
            while len(fleet.children) < 2:  # noqa: ASYNC110
                await anyio.sleep(0.02)
        for child in fleet.children:
            await logged(child, f"waiting for the store at {store.url}")
            assert child.running
        assert await health(listen) == NOT_SERVING
        async with Sessile(listen, retry=RetryPolicy(max_attempts=1)) as client:
            with pytest.raises(Unavailable, match="waits for its store"):
                await client.open()

        await anyio.to_thread.run_sync(store.start)
        with anyio.fail_after(60):
            await started.wait()
        assert await health(listen) == SERVING
        async with Sessile(listen) as client:
            session = await client.open()
            heard: list[int] = []
            died = False
            turn = session.run("Say it.", max_tokens=TOKENS)
            async for event in turn:
                if isinstance(event, Tokens):
                    heard += event.token_ids
                if len(heard) >= 20 and not died:
                    died = True
                    store.kill()
                    await anyio.sleep(0.5)
                    await anyio.to_thread.run_sync(store.start)
            result = await turn.result()
        assert result.status is TurnStatus.COMMITTED
        assert len(heard) == TOKENS
    everything = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert password("") not in everything


async def test_what_no_waiting_will_change_ends_a_process_at_once(
    store: StoreServer, tmp_path: Path
) -> None:
    await anyio.to_thread.run_sync(store.start)
    wrong = settings(tmp_path) | {"SESSILE_GATEWAY__REDIS__PASSWORD": "wrong"}
    fleet = Cluster(redis_url=store.url, log_directory=tmp_path / "logs", environment=wrong)
    async with fleet:
        with pytest.raises(LaunchFailed, match="refuses the credentials"):
            await fleet.start_gateway()


@pytest.mark.parametrize("kind", ["gateway", "worker"])
async def test_waiting_ends_with_its_bound_or_a_signal(tmp_path: Path, kind: str) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    bound = {"SESSILE_COMMON__REDIS__WAIT_S": "0.1"}
    async with Cluster(redis_url=url, log_directory=tmp_path / "a", environment=bound) as fleet:
        with pytest.raises(LaunchFailed, match="no answer from the store"):
            await (fleet.start_gateway() if kind == "gateway" else fleet.start_worker("r1"))
    async with Cluster(redis_url=url, log_directory=tmp_path / "b") as fleet:

        async def stop() -> None:
            with anyio.fail_after(60):
                while not fleet.children:  # noqa: ASYNC110
                    await anyio.sleep(0.02)
            (child,) = fleet.children
            await logged(child, "waiting for the store")
            child.kill(signal.SIGTERM)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop)
            with pytest.raises(LaunchFailed, match="ended with 0"):
                await (fleet.start_gateway() if kind == "gateway" else fleet.start_worker("r1"))


async def test_readiness_follows_the_store_and_the_end_and_liveness_does_not() -> None:
    """Of a gateway and of a worker, told as it changes."""
    with StoreServer(redis_binary()) as server:
        gateway = GatewayConfig(listen="127.0.0.1:0", redis_url=server.url)
        replica = ReplicaSettings("r1", heartbeat_period_s=0.05, drain_grace_s=30)
        worker = WorkerConfig(redis_url=server.url, replica=replica)
        stops: list[anyio.Event] = []

        async def start(serve: Any, config: Any) -> str:
            stops.append(anyio.Event())

            async def life(*, task_status: anyio.abc.TaskStatus[str]) -> None:
                await serve(config, stop=stops[-1], task_status=task_status)

            return str(await tasks.start(life))

        async with anyio.create_task_group() as tasks:
            for serve, config in ((gateway_main.serve, gateway), (worker_main.serve, worker)):
                address = await start(serve, config)
                async with aio.insecure_channel(address) as channel:
                    stub: Any = health_pb2_grpc.HealthStub(channel)
                    ready = stub.Watch(health_pb2.HealthCheckRequest())
                    live = stub.Watch(health_pb2.HealthCheckRequest(service=LIVENESS))
                    with anyio.fail_after(60):
                        assert (await live.read()).status == SERVING
                        assert (await ready.read()).status == SERVING
                        server.kill()
                        assert (await ready.read()).status == NOT_SERVING
                        assert await health(address, LIVENESS) == SERVING
                        await anyio.to_thread.run_sync(server.start)
                        assert (await ready.read()).status == SERVING
                        stops[-1].set()
                        assert (await ready.read()).status == NOT_SERVING
