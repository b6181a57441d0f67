"""Bad input where the transport has a say: over gRPC on a socket, from a client that misbehaves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status
from sessile import errors
from sessile.v1 import fleet_pb2, fleet_pb2_grpc, session_pb2, session_pb2_grpc
from sessile.v1 import types_pb2 as pb

from gateway.config import Admission, GatewayConfig
from gateway.core.quotas import TenantQuota
from gateway.main import serve as serve_gateway
from gateway.security.access import DEFAULT_TENANT
from statestore.script_runner import RetryPolicy
from tests.support.bad_input import broken_text, way_to_text
from tests.support.served_world import SESSIONS, turn_request
from tests.support.servers import running_server, valkey_binary
from workers.config import ReplicaSettings, WorkerConfig
from workers.main import serve as serve_worker

pytestmark = pytest.mark.anyio

ADMISSION = Admission(
    max_message_bytes=1 << 20, max_request_bytes=1 << 20, max_preamble_bytes=1 << 19
)
QUOTAS = {"small": TenantQuota(message_bytes=2_000), "few": TenantQuota(running_turns=1)}
OPTIONS = [("grpc.max_send_message_length", 64 << 20), ("grpc.enable_retries", 0)]
ENGINE = (("eos_probability", "0"), ("step_ms", "20"), ("decode_token_ms", "0"))


class Client:
    """A plain client, of any tenant."""

    def __init__(self, channel: aio.Channel) -> None:
        self.channel = channel
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(channel)
        self.fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)

    async def ready(self) -> None:
        with anyio.fail_after(60):
            async for fleet in self.fleet.WatchFleet(fleet_pb2.WatchFleetRequest()):
                if any(it.state == fleet_pb2.REPLICA_STATE_READY for it in fleet.replicas):
                    return

    async def open(self, name: str, tenant: str = DEFAULT_TENANT) -> str:
        request = session_pb2.OpenSessionRequest(request_id=name, model="sim")
        answer = await self.sessions.OpenSession(request, metadata=of(tenant), timeout=20)
        return str(answer.session.session_id)

    async def ends(
        self, session_id: str, turn_id: str, tenant: str = DEFAULT_TENANT, **more: Any
    ) -> int:
        """The turn is served; its number of tokens."""
        request = turn_request(session_id, turn_id)
        request.MergeFrom(pb.RunTurnRequest(**more))
        call = self.sessions.RunTurn(request, metadata=of(tenant), timeout=30)
        tokens, last = 0, pb.TurnEvent()
        async for message in call:
            for last in message.events:
                tokens += len(last.tokens.token_ids)
        assert last.finished.status == pb.TURN_STATUS_COMMITTED, last
        return tokens


def of(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("x-sessile-tenant", tenant),)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def running() -> AsyncIterator[str]:
    """A gateway and a worker in this process, on sockets; gives the gateway's address."""
    with running_server(valkey_binary()) as url, pytest.MonkeyPatch.context() as patch:
        # These clients try once; a store that stands still for 2 s is no error of theirs.
        patch.setattr("gateway.main.STORE_RETRY", RetryPolicy(total_timeout_s=15.0))
        gateway = GatewayConfig(
            listen="127.0.0.1:0", redis_url=url, admission=ADMISSION, quotas=QUOTAS
        )
        worker = WorkerConfig(redis_url=url, replica=ReplicaSettings("a"), engine_options=ENGINE)
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:
            await tasks.start(lambda **it: serve_worker(worker, stop=stop, **it))
            address = await tasks.start(lambda **it: serve_gateway(gateway, stop=stop, **it))
            try:
                yield address
            finally:
                stop.set()


@pytest.fixture(scope="module")
async def client(anyio_backend: str) -> AsyncIterator[Client]:
    async with (
        running() as address,
        aio.insecure_channel(address, options=OPTIONS) as channel,
    ):
        made = Client(channel)
        await made.ready()
        yield made


async def failure(call: Any, heard: list[Any] | None = None) -> errors.SessileError:
    """Of a call that must fail, as the public client tells it. ``heard``: gets what came before."""
    heard = [] if heard is None else heard
    try:
        if hasattr(call, "__aiter__"):
            async for message in call:
                heard.append(message)
        else:
            await call
    except aio.AioRpcError as error:
        return errors.from_rpc(error)
    raise AssertionError("the call was served")


@pytest.mark.parametrize("method", [name for name, it in SESSIONS.items() if it.DESCRIPTOR.fields])
async def test_text_that_is_no_utf8_is_the_callers_fault(client: Client, method: str) -> None:
    """No client library of Google's would send it: others do."""
    path = f"/sessile.v1.SessionService/{method}"
    streams = method in ("RunTurn", "WatchSession")
    call: Any = client.channel.unary_stream(path) if streams else client.channel.unary_unary(path)
    request = broken_text(way_to_text(SESSIONS[method].DESCRIPTOR))
    error = await failure(call(request, timeout=20))
    assert type(error) is errors.InvalidRequest
    assert "UTF-8" in error.message
    assert "valid UTF-8" in error.hint


async def test_a_request_larger_than_any_may_be_is_refused_by_the_transport(
    client: Client,
) -> None:
    session_id = await client.open("giant")
    await client.ends(session_id, "t1")
    request = turn_request(session_id, "t2")
    request.messages[0].content = "x" * (2 << 20)
    error = await failure(client.sessions.RunTurn(request, timeout=20))
    assert type(error) is errors.InvalidRequest, "a retry would not help"
    assert "Send less" in error.hint
    await client.ends(session_id, "t2")


async def test_a_request_larger_than_the_tenants_may_be_says_how_large(client: Client) -> None:
    session_id = await client.open("small", "small")
    request = turn_request(session_id, "t1")
    request.messages[0].content = "x" * 2_000
    call = client.sessions.RunTurn(request, metadata=of("small"), timeout=20)
    error = await failure(call)
    assert type(error) is errors.MessageTooLarge
    assert error.metadata["limit"] == "2000"
    await client.ends(session_id, "t1", "small")


async def test_a_quota_that_is_used_up_is_told_with_its_name_and_a_delay(client: Client) -> None:
    first, second = await client.open("q1", "few"), await client.open("q2", "few")
    request = turn_request(first, "long", max_tokens=2_000, ignore_eos=True)
    held = client.sessions.RunTurn(request, metadata=of("few"), timeout=30)
    assert await held.read() is not aio.EOF
    with pytest.raises(aio.AioRpcError) as refused:
        await client.ends(second, "t", "few")
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(refused.value)  # type: ignore[arg-type]
    assert status is not None
    found = error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(found) for detail in status.details)
    assert found.violations[0].subject == "quota:running_turns"
    error = errors.from_rpc(refused.value)
    assert type(error) is errors.QuotaExceeded
    assert error.retry_after_s
    held.cancel()
    cancel = session_pb2.CancelTurnRequest(session_id=first, turn_id="long")
    await client.sessions.CancelTurn(cancel, metadata=of("few"), timeout=20)
    with anyio.fail_after(20):
        while True:
            try:
                await client.ends(second, "t", "few")
                break
            except aio.AioRpcError as error_:
                told = errors.from_rpc(error_)
                assert isinstance(told, errors.QuotaExceeded)
                await anyio.sleep(told.retry_after_s or 0)


async def test_a_turn_outlives_the_deadline_of_the_call_and_is_attached_to(client: Client) -> None:
    for deadline_s in (0.4, 1.6, 6.4):
        session_id = await client.open(f"late {deadline_s}")
        count = round(150 * deadline_s)  # three times as long as the call
        request = turn_request(session_id, "t1", max_tokens=count, ignore_eos=True)
        call = client.sessions.RunTurn(request, timeout=deadline_s)
        begun: list[pb.TurnStream] = []
        assert type(await failure(call, begun)) is errors.DeadlineExceeded
        if begun:
            break  # else the deadline came first: there is no turn to attach to
    error = await failure(client.sessions.RunTurn(turn_request(session_id, "t2"), timeout=20))
    assert type(error) is errors.TurnInProgress
    attached = pb.RunTurnRequest(session_id=session_id, turn_id="t1", attach_only=True)
    tokens = 0
    async for message in client.sessions.RunTurn(attached, timeout=30):
        tokens += sum(len(event.tokens.token_ids) for event in message.events)
    assert tokens == count
    await client.ends(session_id, "t2")


async def test_a_turns_own_deadline_ends_it_and_says_so(client: Client) -> None:
    session_id = await client.open("short")
    request = turn_request(session_id, "t1", max_tokens=2_000, ignore_eos=True)
    request.timeout_ms = 300
    events: list[pb.TurnEvent] = []
    try:
        async for message in client.sessions.RunTurn(request, timeout=20):
            events += message.events
    except aio.AioRpcError as error:  # where the store answers late: a stream is not for ever
        if type(errors.from_rpc(error)) is not errors.Unavailable:
            raise
        again = pb.RunTurnRequest(session_id=session_id, turn_id="t1", attach_only=True)
        async for message in client.sessions.RunTurn(again, timeout=20):
            events += message.events
    last = events[-1]
    assert last.finished.status == pb.TURN_STATUS_FAILED
    assert last.finished.reason == pb.FINISH_REASON_DEADLINE
    assert last.finished.error
    await client.ends(session_id, "t2")
