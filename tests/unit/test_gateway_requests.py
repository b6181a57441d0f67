"""Requests that do not come, and services that need no credentials: over gRPC on a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import grpc
import pytest
from google.protobuf.message import Message
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sessile.v1 import session_pb2

from gateway.app.admission import Gate
from gateway.config import GatewayConfig
from gateway.core.errors import DeadlineExceeded, Overloaded, SessileError
from gateway.main import serve as serve_gateway
from gateway.rpc.auth import HeaderTenant
from gateway.rpc.requests import OpenServices, RequestReader
from gateway.rpc.serving import Serving
from gateway.rpc.status import error_from_rpc
from tests.support.gateway_world import simulated
from tests.support.grpc_server import listening
from tests.support.servers import free_port

pytestmark = pytest.mark.anyio

REQUEST = session_pb2.GetSessionRequest(session_id="ses_a")
KINDS = ("Unary", "Watch", "Relay")


@asynccontextmanager
async def serving(
    *, request_s: float = 30.0, places: int = 2, open_places: int = 2
) -> AsyncIterator[aio.Channel]:
    """One call of each kind, and health."""
    server = aio.server()

    def gate(name: str) -> Gate:
        return Gate(name, places, 700)

    served = Serving(
        HeaderTenant(),
        gate("max_calls"),
        gate("max_watches"),
        requests=gate("max_rpcs"),
        request_s=request_s,
    )

    async def get(tenant: str, request: session_pb2.GetSessionRequest) -> Message:
        return session_pb2.GetSessionResponse(
            session={"session_id": f"{tenant} {request.session_id}"}  # type: ignore[arg-type]
        )

    async def watch(tenant: str, request: session_pb2.GetSessionRequest) -> AsyncIterator[Message]:
        yield await get(tenant, request)

    async def relay(tenant: str, request: Any, _: float | None, sink: Any) -> None:
        await sink((await get(tenant, request)).SerializeToString())

    kind = session_pb2.GetSessionRequest
    methods: dict[str, Any] = {
        "Unary": served.unary(get, kind),
        "Watch": served.streaming(watch, kind),  # type: ignore[arg-type]
        "Relay": served.relayed(relay, kind),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", methods),))
    bounded: Any = OpenServices(server, Gate("max_open_calls", open_places, 700), request_s)
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, bounded)
    async with listening(server) as channel:
        yield channel


def unsent(channel: aio.Channel, path: str) -> Any:
    """A call that has begun and sends no request."""
    return channel.stream_stream(path)()


async def failure(call: Any) -> aio.AioRpcError:
    with anyio.fail_after(10), pytest.raises(aio.AioRpcError) as error:
        await call.read()
    return error.value


@pytest.mark.parametrize("kind", KINDS)
async def test_clients_of_the_usual_kinds_are_served(kind: str) -> None:
    async with serving() as channel:
        if kind == "Unary":
            unary: Any = channel.unary_unary("/t/Unary")
            data = await unary(REQUEST.SerializeToString())
        else:
            stream: Any = channel.unary_stream(f"/t/{kind}")
            (data,) = [message async for message in stream(REQUEST.SerializeToString())]
        answer = session_pb2.GetSessionResponse.FromString(data)
        assert answer.session.session_id == "default ses_a"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_that_does_not_come_is_not_waited_for(kind: str) -> None:
    async with serving(request_s=0.1) as channel:
        for _ in range(3):  # more than there are places
            error = await failure(unsent(channel, f"/t/{kind}"))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            told = error_from_rpc(error)
            assert "did not come within 0.1 s" in str(told)
            assert "Send the request" in told.hint


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_without_a_request_is_the_callers_mistake(kind: str) -> None:
    async with serving() as channel:
        call = unsent(channel, f"/t/{kind}")
        await call.done_writing()
        error = await failure(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "carries no request" in str(error_from_rpc(error))


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_that_wait_for_their_request_are_bounded(kind: str) -> None:
    async with serving() as channel:
        held = [unsent(channel, f"/t/{kind}") for _ in range(3)]
        codes = []
        async with anyio.create_task_group() as tasks:

            async def note(call: Any) -> None:
                codes.append((await failure(call)).code())
                tasks.cancel_scope.cancel()

            for call in held:
                tasks.start_soon(note, call)
        assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED]


async def test_health_is_served_and_its_watches_are_bounded() -> None:
    async with serving() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        watches: list[Any] = [stub.Watch(request) for _ in range(2)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        error = await failure(stub.Watch(request))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_from_rpc(error).retry_after_ms == 700
        watches[0].cancel()
        with anyio.fail_after(10):
            while True:
                try:
                    assert (await stub.Check(request)).status
                    break
                except aio.AioRpcError:
                    await anyio.sleep(0.01)


async def test_a_check_of_health_that_sends_nothing_is_not_waited_for() -> None:
    async with serving(request_s=0.1) as channel:
        error = await failure(unsent(channel, "/grpc.health.v1.Health/Check"))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


class Held:
    """The context of a call whose request comes when the test says so."""

    def __init__(self) -> None:
        self.asked, self.comes = False, anyio.Event()

    async def read(self) -> bytes:
        self.asked = True
        await self.comes.wait()
        return b"request"


async def test_of_one_caller_so_many_requests_are_taken_in_at_once() -> None:
    reader = RequestReader(30.0, at_once=2)
    greedy, other = [Held() for _ in range(4)], Held()
    heard: list[bytes] = []

    async def read(context: Any, caller: str) -> None:
        heard.append(await reader.read(context, caller))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            for context in greedy:
                tasks.start_soon(read, context, "greedy")
            tasks.start_soon(read, other, "other")
            await anyio.wait_all_tasks_blocked()
            assert [context.asked for context in (*greedy, other)] == [
                True,
                True,
                False,
                False,
                True,
            ]
            greedy[0].comes.set()
            await anyio.wait_all_tasks_blocked()
            assert [context.asked for context in greedy] == [True, True, True, False]
            assert reader.callers == 2
            for context in (*greedy, other):
                context.comes.set()
    assert heard == [b"request"] * 5
    assert reader.callers == 0


@simulated
async def test_who_waits_for_its_own_calls_has_its_time_too_or_may_come_again() -> None:
    reader = RequestReader(1.0, at_once=1)
    contexts: list[Any] = [Held(), Held(), Held()]
    told: list[SessileError] = []
    async with anyio.create_task_group() as tasks:

        async def given_up(context: Any) -> None:
            with pytest.raises(SessileError) as error:
                await reader.read(context, "greedy")
            told.append(error.value)

        for context in contexts:
            tasks.start_soon(given_up, context)
            await anyio.sleep(0.3)
    assert [type(error) for error in told] == [DeadlineExceeded, Overloaded, DeadlineExceeded]
    assert isinstance(told[1], Overloaded)
    assert told[1].retry_after_ms
    assert [context.asked for context in contexts] == [True, True, False]
    assert reader.callers == 0


@asynccontextmanager
async def waiting_gateway(*, reflection: bool) -> AsyncIterator[aio.Channel]:
    """A whole gateway whose store is not there: what needs no credentials it serves already."""
    listen, stop = f"127.0.0.1:{free_port()}", anyio.Event()
    config = GatewayConfig(
        listen=listen, redis_url=f"redis://127.0.0.1:{free_port()}", reflection=reflection
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(serve_gateway, config, stop=stop))
        async with aio.insecure_channel(listen) as channel:
            with anyio.fail_after(20):
                await channel.channel_ready()
            yield channel
        stop.set()


async def test_reflection_lists_the_services() -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with waiting_gateway(reflection=True) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with anyio.fail_after(10):
            (answer,) = [it async for it in stub.ServerReflectionInfo(iter([request]))]
        assert {service.name for service in answer.list_services_response.service} == {
            *("sessile.v1.SessionService", "sessile.v1.FleetService"),
            "grpc.reflection.v1alpha.ServerReflection",
        }


async def test_reflection_can_be_turned_off() -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with waiting_gateway(reflection=False) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        error = await failure(stub.ServerReflectionInfo(iter([request])))
        assert "waits for its store" in str(error.details()), "what every other call is told"
        check: Any = health_pb2_grpc.HealthStub(channel)
        answer = await check.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
