"""What the shell offers while a command is typed: ids that the caller may see, or nothing."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator

import pytest
from sessile.v1 import session_pb2
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.core import errors
from tests.support.fake_gateway import (
    Fail,
    FakeGateway,
    gateway_in_a_thread,
    listing,
    session,
)
from tests.support.servers import free_port

KEY = "sk-aaaaaaaa-secret"


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    monkeypatch.setattr("gateway.cli.complete.TIME_LIMIT_S", 20.0)  # it does answer, now or soon
    with gateway_in_a_thread() as fake:
        yield fake


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SESSILE_GATEWAY", "SESSILE_TENANT", "SESSILE_API_KEY", "SESSILE_TLS"):
        monkeypatch.setenv(name, "")  # and put back, whatever a command writes there
        os.environ.pop(name)


def offered(*words: str, **variables: str) -> list[str]:
    """By bash, for the last of the words."""
    asked = {
        "_SESSILE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("sessile", *words)),
        "COMP_CWORD": str(len(words)),
    }
    run = CliRunner().invoke(app, [], prog_name="sessile", env={**asked, **variables})
    assert run.exit_code == 0, run.output
    assert run.stderr == ""
    return run.stdout.split()


def sessions(*ids: str) -> session_pb2.ListSessionsResponse:
    return session_pb2.ListSessionsResponse(sessions=[session(name) for name in ids])


@pytest.mark.parametrize(
    "words",
    [
        ("sessions", "show"),
        ("sessions", "transcript"),
        ("sessions", "fork"),
        ("sessions", "close"),
        ("migrate",),
        ("chat", "--session"),
    ],
)
def test_sessions_are_offered_where_one_is_named(
    gateway: FakeGateway, words: tuple[str, ...]
) -> None:
    gateway.answers.append(sessions("ses_ab", "ses_b", "ses_ac"))
    found = offered(*words, "ses_a", SESSILE_GATEWAY=gateway.target)
    assert found == ["ses_ab", "ses_ac"]


@pytest.mark.parametrize(
    "words", [("replicas", "drain"), ("replicas", "undrain"), ("migrate", "ses_a")]
)
def test_replicas_are_offered_where_one_is_named(
    gateway: FakeGateway, words: tuple[str, ...]
) -> None:
    gateway.answers.append(listing("r1", "r2", "other"))
    assert offered(*words, "r", SESSILE_GATEWAY=gateway.target) == ["r1", "r2"]


def test_the_gateway_is_asked_as_the_caller(gateway: FakeGateway) -> None:
    gateway.answers += [sessions("ses_a")] * 3
    words = ("sessions", "show", "--gateway", gateway.target, "--tenant", "acme", "")
    assert offered("--api-key", KEY, *words) == ["ses_a"]
    assert offered(*words, SESSILE_API_KEY=KEY) == ["ses_a"]
    assert offered(*words[:4], "", SESSILE_TENANT="globex") == ["ses_a"]
    assert gateway.tenants == ["acme", "acme", "globex"]
    assert gateway.authorizations[:2] == [f"Bearer {KEY}"] * 2


def test_what_is_named_already_is_not_offered_again(gateway: FakeGateway) -> None:
    gateway.answers.append(sessions("ses_a", "ses_b"))
    found = offered("sessions", "close", "ses_a", "ses_", SESSILE_GATEWAY=gateway.target)
    assert found == ["ses_b"]


def test_who_may_not_see_replicas_is_offered_none(
    gateway: FakeGateway, capfd: pytest.CaptureFixture[str]
) -> None:
    gateway.answers.append(Fail(errors.PermissionDenied("for operators")))
    assert offered("replicas", "drain", "", SESSILE_GATEWAY=gateway.target) == []
    assert capfd.readouterr().err == ""


def test_without_a_gateway_there_is_nothing_and_not_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    for gateways in (nobody, f"{nobody} {nobody}", "no.such.host.invalid:1", ":::"):
        assert offered("sessions", "show", "", SESSILE_GATEWAY=gateways) == []
    wrong = {"SESSILE_TLS": "/no/such/file", "SESSILE_GATEWAY": nobody}
    assert offered("sessions", "show", "", **wrong) == []
    assert capfd.readouterr().err == ""


def test_a_gateway_that_does_not_answer_is_not_waited_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert offered("sessions", "show", "", SESSILE_GATEWAY=target) == []
        assert offered("replicas", "drain", "", SESSILE_GATEWAY=target, SESSILE_TLS="1") == []
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err == ""


def test_nothing_is_said_beside_the_words_that_are_typed(
    gateway: FakeGateway, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    far = {"SESSILE_GATEWAY": "no.such.host.invalid:1", "SESSILE_API_KEY": KEY}
    assert offered("sessions", "show", "", **far) == []  # the client warns of the key without TLS
    plain = {"SESSILE_GATEWAY": gateway.target, "SESSILE_TLS": "1"}
    assert offered("sessions", "show", "", **plain) == []  # gRPC itself, of the handshake
    assert caplog.records == []
    assert capfd.readouterr().err == ""
    logging.getLogger("sessile").warning("again")
    assert caplog.messages == ["again"]
