"""The client's error tree against the server's: every reason arrives as what it is."""

from __future__ import annotations

import grpc
import pytest
import sessile
from grpc import aio
from sessile.errors import BY_REASON, SessileError, from_rpc

from gateway.core import errors
from gateway.rpc.status import DETAILS_KEY, code_of, to_status


def rpc_error(error: errors.SessileError) -> aio.AioRpcError:
    status = to_status(error)
    trailing = aio.Metadata((DETAILS_KEY, status.SerializeToString()))
    return aio.AioRpcError(code_of(error), aio.Metadata(), trailing, details=status.message)


def tree(cls: type[errors.SessileError]) -> list[type[errors.SessileError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in tree(child))]


SERVER = [cls for cls in tree(errors.SessileError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", SERVER, ids=lambda cls: cls.__name__)
def test_every_reason_of_the_server_is_known(cls: type[errors.SessileError]) -> None:
    got = from_rpc(rpc_error(cls("what happened", retry_after_ms=250, metadata={"k": "v"})))
    assert cls.reason in BY_REASON
    assert got.reason == cls.reason
    assert got.message == "what happened"
    assert got.hint == cls.default_hint
    assert got.retry_after_s == 0.25
    assert got.metadata == {"k": "v"}


@pytest.mark.parametrize("cls", SERVER, ids=lambda cls: cls.__name__)
def test_classes_bear_the_servers_names(cls: type[errors.SessileError]) -> None:
    got = type(from_rpc(rpc_error(cls("m")))).__name__
    renamed = {"NotOwner": "Unavailable", "SessileError": "InternalError"}
    assert got == renamed.get(cls.__name__, cls.__name__)


def test_every_class_is_public() -> None:
    def names(cls: type[SessileError]) -> list[str]:
        return [cls.__name__, *(n for child in cls.__subclasses__() for n in names(child))]

    assert set(names(SessileError)) <= set(sessile.__all__)


def test_a_reason_of_a_newer_server_falls_back_to_its_code() -> None:
    got = from_rpc(rpc_error(errors.WrongState("m", reason="SOMETHING_NEW")))
    assert type(got) is sessile.WrongState
    assert got.reason == "SOMETHING_NEW"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, sessile.Unavailable),
        (grpc.StatusCode.UNAUTHENTICATED, sessile.Unauthenticated),
        (grpc.StatusCode.DEADLINE_EXCEEDED, sessile.DeadlineExceeded),
        (grpc.StatusCode.UNKNOWN, sessile.InternalError),
    ],
)
def test_errors_without_details_go_by_their_code(
    code: grpc.StatusCode, expected: type[SessileError]
) -> None:
    got = from_rpc(aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details="d"))
    assert type(got) is expected
    assert got.reason == code.name


def test_the_text_says_what_to_do_next() -> None:
    assert "Open a new session." in str(from_rpc(rpc_error(errors.SessionClosed("It is closed."))))
