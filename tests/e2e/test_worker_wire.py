"""A worker on the wire: real gRPC, real data channel, a real store, one process."""

from __future__ import annotations

import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import replica_pb2_grpc, session_pb2, types_pb2

from gateway.core import errors
from gateway.rpc.status import error_from_rpc
from statestore.digest import RollingDigest
from statestore.embedded import embedded_server
from statestore.ports import SessionWritten
from statestore.records import NewSession, ReplicaRef, Session
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from workers.config import ReplicaSettings, WorkerConfig
from workers.main import serve
from workers.rpc import SERVICE

TENANT = "acme"
SESSION = "ses_aaaaaaaaaaaaaaaa"


class Fleet:
    """Workers over one embedded store."""

    def __init__(self, store: RedisStore, tasks: anyio.abc.TaskGroup, url: str) -> None:
        self.store = store
        self.url = url
        self.stops: dict[str, anyio.Event] = {}
        self.ended: dict[str, anyio.Event] = {}
        self._tasks = tasks

    async def start(
        self, name: str, listen: str = "127.0.0.1:0", kv_listen: str = "127.0.0.1:0"
    ) -> str:
        config = WorkerConfig(
            listen=listen,
            kv_listen=kv_listen,
            redis_url=self.url,
            replica=ReplicaSettings(name, heartbeat_period_s=0.05),
            engine_options=(("step_ms", "1"), ("eos_probability", "0")),
        )
        stop = self.stops[name] = anyio.Event()
        ended = self.ended[name] = anyio.Event()

        async def life(*, task_status: anyio.abc.TaskStatus[str]) -> None:
            await serve(config, stop=stop, task_status=task_status)
            ended.set()

        endpoint = await self._tasks.start(life)
        assert isinstance(endpoint, str)
        return endpoint

    async def ref(self, name: str) -> ReplicaRef:
        return next(r.ref for r in await self.store.fleet() if r.ref.replica_id == name)

    async def place(self, name: str) -> Session:
        session = await self.store.get_session(SESSION)
        assert session is not None
        change = self.store.place if session.owner is None else self.store.take
        nonce = secrets.token_bytes(8)
        outcome = await change(SESSION, session.epoch, await self.ref(name), nonce)
        assert isinstance(outcome, SessionWritten)
        return outcome.session


def dispatch(session: Session, turn_id: str, text: str) -> pb.DispatchTurnRequest:
    assert session.owner is not None
    ref = session.owner.replica
    return pb.DispatchTurnRequest(
        turn=types_pb2.RunTurnRequest(
            session_id=SESSION,
            turn_id=turn_id,
            messages=[types_pb2.Message(role=types_pb2.Message.ROLE_USER, content=text)],
            params=types_pb2.SamplingParams(max_tokens=100),
        ),
        epoch=types_pb2.Epoch(number=session.epoch.number, nonce=session.epoch.nonce),
        replica=types_pb2.ReplicaRef(replica_id=ref.replica_id, incarnation=ref.incarnation),
        tenant=TENANT,
    )


async def events(endpoint: str, request: pb.DispatchTurnRequest) -> list[types_pb2.TurnEvent]:
    async with aio.insecure_channel(endpoint) as channel:
        stub = replica_pb2_grpc.ReplicaServiceStub(channel)
        return [event async for part in stub.DispatchTurn(request) for event in part.events]


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    async with embedded_server() as url:
        store = RedisStore(await connect(url))
        salt = await store.tenant_salt(TENANT)
        root = RollingDigest(salt).position().digest
        preamble = session_pb2.OpenSessionRequest().SerializeToString()
        await store.open_session(NewSession(SESSION, TENANT, "sim", preamble, root))
        async with anyio.create_task_group() as tasks:
            running = Fleet(store, tasks, url)
            yield running
            for stop in running.stops.values():
                stop.set()
        await store.aclose()


@pytest.mark.anyio
async def test_a_turn_runs_moves_with_its_kv_and_goes_on() -> None:
    async with fleet() as f:
        first, second = await f.start("r1"), await f.start("r2")
        one = await events(first, dispatch(await f.place("r1"), "t1", "Hello"))
        assert sum(len(e.tokens.token_ids) for e in one) == 100
        session = await f.store.get_session(SESSION)
        assert session is not None
        source = await f.ref("r1")
        async with aio.insecure_channel(second) as channel:
            answer = await replica_pb2_grpc.ReplicaServiceStub(channel).ImportSession(
                pb.ImportSessionRequest(
                    session_id=SESSION,
                    source_endpoint=first,
                    source=types_pb2.ReplicaRef(
                        replica_id=source.replica_id, incarnation=source.incarnation
                    ),
                    up_to=types_pb2.Position(
                        length=session.head.length, digest=session.head.digest
                    ),
                    tenant=TENANT,
                )
            )
        assert answer.verified.length == (session.head.length - 1) // 16 * 16
        assert answer.bytes_copied > 0
        two = await events(second, dispatch(await f.place("r2"), "t2", "More"))
        assert two[-1].finished.usage.cached_tokens == answer.verified.length
        with pytest.raises(aio.AioRpcError) as caught:
            await events(first, dispatch(session, "t3", "Too late"))
        assert isinstance(error_from_rpc(caught.value), errors.NotOwner)


@pytest.mark.anyio
async def test_a_worker_reports_its_health_and_says_good_bye() -> None:
    async with fleet() as f:
        endpoint = await f.start("r1")
        async with aio.insecure_channel(endpoint) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=5
            )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        f.stops["r1"].set()
        with anyio.fail_after(10):
            await f.ended["r1"].wait()
        assert (await f.store.fleet())[0].gone
        async with aio.insecure_channel(endpoint) as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=5
                )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.anyio
async def test_a_worker_serves_on_an_ipv6_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with fleet() as f:
        endpoint = await f.start("r1", listen="[::1]:0", kv_listen="[::1]:0")
        assert endpoint.startswith("[::1]:")
        heard = await events(endpoint, dispatch(await f.place("r1"), "t1", "Hello"))
        assert heard[-1].HasField("finished")


@pytest.mark.anyio
async def test_bytes_that_are_no_request_are_the_callers_mistake() -> None:
    async with fleet() as f, aio.insecure_channel(await f.start("r1")) as channel:
        for name in ("StopTurn", "DispatchTurn"):
            call: Any = channel.unary_stream(f"/{SERVICE}/{name}")
            with pytest.raises(aio.AioRpcError) as caught:
                await call(b"\xff").read()
            error = error_from_rpc(caught.value)
            assert isinstance(error, errors.InvalidRequest)
            assert error.message.startswith(f"the request is no {name}Request")


@pytest.mark.parametrize(
    "wrong",
    [
        {"redis_url": ""},
        {"listen": "nowhere"},
        {"kv_listen": "host:99999"},
        {"listen": "0.0.0.0:0"},
        {"shutdown_grace_s": 0},
        {"engine_options": (("a", "1"), ("a", "2"))},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    settings = {"redis_url": "unix:///x", "replica": ReplicaSettings("r1")} | wrong
    with pytest.raises(ValueError, match=r"\w"):
        WorkerConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_two_workers_do_not_share_a_port() -> None:
    async with fleet() as f:
        taken = await f.start("a")
        with pytest.raises(OSError, match=f"cannot listen on {taken}"):
            await f.start("b", listen=taken)
