"""The error tree reaches the other side of a call unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio

from gateway.app.ports import ReplicaLost
from gateway.core import errors
from gateway.core.errors import SessileError
from gateway.rpc import status
from tests.support.grpc_server import listening


def _tree(cls: type[SessileError]) -> list[type[SessileError]]:
    found = [cls]
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            found += _tree(child)
    return found


def _as_rpc_error(error: SessileError) -> aio.AioRpcError:
    details = status.to_status(error)
    return aio.AioRpcError(
        status.code_of(error),
        aio.Metadata(),
        aio.Metadata((status.DETAILS_KEY, details.SerializeToString())),
        details=details.message,
    )


@contextlib.asynccontextmanager
async def _failing_server(error: SessileError) -> AsyncIterator[aio.Channel]:
    async def handler(request: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        await status.abort(context, error)

    server = aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "t.T", {"Fail": grpc.unary_unary_rpc_method_handler(handler)}
            ),
        )
    )
    async with listening(server) as channel:
        yield channel


def test_every_class_of_the_tree_has_a_code() -> None:
    assert set(_tree(SessileError)) == set(status.CODES)


def test_reason_words_name_one_class_each() -> None:
    reasons = [cls.reason for cls in _tree(SessileError) if cls is not SessileError]
    assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize("cls", [c for c in _tree(SessileError) if c is not SessileError])
def test_an_error_survives_the_wire(cls: type[SessileError]) -> None:
    sent = cls("what happened", hint="do this", retry_after_ms=1250, metadata={"k": "v"})
    got = status.error_from_rpc(_as_rpc_error(sent))
    assert type(got) is cls
    assert (got.message, got.hint, got.reason) == (sent.message, sent.hint, sent.reason)
    assert (got.retry_after_ms, got.metadata) == (1250, {"k": "v"})


def test_a_custom_reason_keeps_its_word_and_the_class_of_its_code() -> None:
    got = status.error_from_rpc(
        _as_rpc_error(errors.NotFound("no such turn", reason="TURN_NOT_FOUND"))
    )
    assert type(got) is errors.NotFound
    assert got.reason == "TURN_NOT_FOUND"
    assert got.retry_after_ms is None


def test_a_class_from_elsewhere_is_mapped_as_its_ancestor() -> None:
    error = ReplicaLost("gone", refused=True)
    assert status.code_of(error) is grpc.StatusCode.UNAVAILABLE
    assert type(status.error_from_rpc(_as_rpc_error(error))) is errors.Unavailable


def test_transport_errors_have_a_class_by_their_code() -> None:
    def bare(code: grpc.StatusCode) -> SessileError:
        return status.error_from_rpc(aio.AioRpcError(code, aio.Metadata(), aio.Metadata()))

    assert type(bare(grpc.StatusCode.UNAVAILABLE)) is errors.Unavailable
    assert type(bare(grpc.StatusCode.DEADLINE_EXCEEDED)) is errors.DeadlineExceeded
    assert type(bare(grpc.StatusCode.UNIMPLEMENTED)) is errors.InternalError


def test_details_that_contradict_the_status_are_ignored() -> None:
    details = status.to_status(errors.NotFound("x"))
    lying = aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        aio.Metadata(),
        aio.Metadata((status.DETAILS_KEY, details.SerializeToString())),
        details="x",
    )
    assert type(status.error_from_rpc(lying)) is errors.Unavailable


def test_long_texts_are_cut_so_that_trailers_stay_small() -> None:
    error = errors.InternalError(
        "m" * 100_000, hint="h" * 100_000, metadata={f"k{i:03}": "v" for i in range(100)}
    )
    packed = status.to_status(error)
    assert len(packed.SerializeToString()) < 4096
    info = error_details_pb2.ErrorInfo()
    packed.details[0].Unpack(info)
    assert len(info.metadata) == status.MAX_METADATA_ENTRIES


@pytest.mark.anyio
async def test_abort_carries_the_error_over_a_real_call() -> None:
    sent = errors.Overloaded("full: café", retry_after_ms=300, metadata={"bound": "max_streams"})
    async with _failing_server(sent) as channel:
        call: Any = channel.unary_unary("/t.T/Fail")
        with pytest.raises(aio.AioRpcError) as caught:
            await call(b"")
    got = status.error_from_rpc(caught.value)
    assert type(got) is errors.Overloaded
    assert (got.message, got.retry_after_ms) == (sent.message, 300)
    assert got.metadata == {"bound": "max_streams"}


@pytest.mark.anyio
async def test_the_longest_texts_of_any_script_arrive() -> None:
    """gRPC writes a byte beyond ASCII as three and refuses trailers past a limit."""
    text = "会话" * 10_000
    sent = errors.NotFound(text, hint=text, metadata={f"key{i}{text}": text for i in range(20)})
    async with _failing_server(sent) as channel:
        call: Any = channel.unary_unary("/t.T/Fail")
        for _ in range(20):  # past the soft limit a call is refused at random
            with pytest.raises(aio.AioRpcError) as caught:
                await call(b"")
            got = status.error_from_rpc(caught.value)
            assert type(got) is errors.NotFound
            assert got.message.startswith("会话")
            assert got.hint.endswith("…")
