"""Commands against a scripted gateway: what they print, and how they end."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sessile.v1 import fleet_pb2, session_pb2
from sessile.v1 import types_pb2 as pb
from typer.testing import CliRunner, Result

import workers.main
from gateway.cli.chat import _Interrupted
from gateway.cli.main import app
from gateway.core import errors
from statestore.process import Announce
from tests.support.fake_gateway import (
    Fail,
    FakeGateway,
    accepted,
    finished,
    gateway_in_a_thread,
    listing,
    place,
    session,
    tokens,
)
from workers.config import WorkerConfig
from workers.text.port import TemplateRefused


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with gateway_in_a_thread() as fake:
        yield fake


def sessile(gateway: FakeGateway | None, *arguments: str, text: str = "") -> Result:
    target = ["--gateway", gateway.target] if gateway is not None else []
    return CliRunner().invoke(app, [*arguments, *target], input=text)


def test_sessions_are_listed_with_their_replica(gateway: FakeGateway) -> None:
    owner = pb.Owner(replica=pb.ReplicaRef(replica_id="r7", incarnation=1))
    found = session("ses_abc", owner=owner, head=place(42), turn_index=3, labels={"job": "x"})
    gateway.answers += [session_pb2.ListSessionsResponse(sessions=[found])] * 2
    shown = sessile(gateway, "sessions", "ls", "--label", "job=x", "--tenant", "acme")
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("ses_abc", "r7", "42", "job=x"))
    assert gateway.tenants == ["acme"]
    assert dict(gateway.seen[0].labels) == {"job": "x"}
    (record,) = json.loads(sessile(gateway, "sessions", "ls", "--json").stdout)
    assert record["session_id"] == "ses_abc"
    assert record["owner"] == {"replica_id": "r7", "incarnation": 1}
    assert record["head"]["length"] == 42


def test_a_transcript_is_printed_as_it_was_said(gateway: FakeGateway) -> None:
    turn = session_pb2.TranscriptTurn(
        turn_id="t0",
        status=pb.TURN_STATUS_COMMITTED,
        input=[pb.Message(role=pb.Message.ROLE_USER, content="[bold]hi[/bold]")],
        output_text="hello",
    )
    gateway.answers.append(session_pb2.GetTranscriptResponse(turns=[turn]))
    shown = sessile(gateway, "sessions", "transcript", "ses_a")
    assert "user: [bold]hi[/bold]" in shown.stdout
    assert "assistant: hello" in shown.stdout


def test_forks_and_closes(gateway: FakeGateway) -> None:
    gateway.answers += [
        session_pb2.ForkSessionResponse(session=session("ses_a.b", parent_id="ses_a")),
        session_pb2.CloseSessionResponse(),
    ]
    forked = sessile(gateway, "sessions", "fork", "ses_a", "--at-turn", "2", "--json")
    assert json.loads(forked.stdout)["session_id"] == "ses_a.b"
    assert sessile(gateway, "sessions", "close", "ses_a", "--purge").exit_code == 0
    assert gateway.seen[0].at_turn_index == 2
    assert gateway.seen[1].purge


def test_a_session_that_is_not_there_does_not_stop_the_rest_from_closing(
    gateway: FakeGateway,
) -> None:
    gateway.answers += [Fail(errors.NotFound("no session")), session_pb2.CloseSessionResponse()]
    closed = sessile(gateway, "sessions", "close", "ses_gone", "ses_a", "--json")
    assert closed.exit_code == 1
    assert closed.stderr.startswith("error: no session")
    assert json.loads(closed.stdout) == {"closed": "ses_a"}


def test_an_error_is_one_line_with_its_hint(gateway: FakeGateway) -> None:
    gateway.answers.append(Fail(errors.NotFound("no session ses_x")))
    shown = sessile(gateway, "sessions", "show", "ses_x")
    assert shown.exit_code == 1
    assert shown.stdout == ""
    assert shown.stderr.splitlines() == [
        "error: no session ses_x",
        f"  {errors.NotFound.default_hint}",
    ]


def test_replicas_are_listed(gateway: FakeGateway) -> None:
    gateway.answers += [listing("r1", "r2"), listing("r1")]
    shown = sessile(gateway, "replicas", "ls")
    assert "r1" in shown.stdout
    assert "r2" in shown.stdout
    (record,) = json.loads(sessile(gateway, "replicas", "ls", "--json").stdout)
    assert (record["state"], record["load"]["sessions"]) == ("ready", 2)


def test_a_drain_is_undone(gateway: FakeGateway) -> None:
    gateway.answers.append(fleet_pb2.DrainReplicaResponse(remaining=3, done=True))
    shown = sessile(gateway, "replicas", "undrain", "r1")
    assert shown.exit_code == 0, shown.output
    assert "3 are still there" in shown.stdout
    (request,) = gateway.seen
    assert (request.replica_id, request.undo, request.shutdown) == ("r1", True, False)


def test_a_drain_that_leaves_sessions_behind_fails(gateway: FakeGateway) -> None:
    gateway.answers += [
        fleet_pb2.DrainReplicaResponse(moved_with_kv=1, remaining=2),
        fleet_pb2.DrainReplicaResponse(moved_with_kv=2, remaining=1, failed=1, done=True),
    ]
    shown = sessile(gateway, "replicas", "drain", "r1")
    assert shown.exit_code == 1
    assert "2 moved with KV" in shown.stdout
    assert "not every session" in shown.stderr


def test_a_move_that_did_not_happen_fails_and_says_why(gateway: FakeGateway) -> None:
    moved = fleet_pb2.MigrationResult(session_id="ses_a", moved=True, verified_tokens=32)
    kept = fleet_pb2.MigrationResult(session_id="ses_a", detail="the copy broke")
    gateway.answers += [
        fleet_pb2.MigrateSessionResponse(result=moved),
        fleet_pb2.MigrateSessionResponse(result=kept),
    ]
    assert "32 tokens" in sessile(gateway, "migrate", "ses_a", "r2").stdout
    failed = sessile(gateway, "migrate", "ses_a")
    assert failed.exit_code == 1
    assert "the copy broke" in failed.stderr
    assert gateway.seen[0].target_replica_id == "r2"


def test_chat_says_one_thing_or_reads_lines(gateway: FakeGateway) -> None:
    whole = [accepted(), tokens(0), finished(2)]
    gateway.answers += [session_pb2.OpenSessionResponse(session=session())] * 2
    gateway.turns += [whole, whole, whole]
    once = sessile(gateway, "chat", "hi", "there", "--system", "be brief", "--json")
    assert json.loads(once.stdout)["text"] == "a b "
    assert gateway.requests(pb.RunTurnRequest)[0].messages[0].content == "hi there"
    lines = sessile(gateway, "chat", text="one\n\ntwo\n")
    assert lines.exit_code == 0, lines.output
    assert lines.stdout == "a b \na b \n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sessions", "nonsense"],
        ["sessions", "ls", "--label", "nonsense"],
        ["worker", "--redis", "redis://x", "--engine", "nonsense"],
        ["worker", "--redis", "redis://x", "--engine-option", "nonsense"],
        ["worker", "--redis", "redis://x", "--listen", "nonsense"],
        ["gateway", "--listen", "nonsense"],
        ["worker", "--redis", "redis://x", "--id", "a b"],
        ["gateway", "--id", "a/b"],
        ["gateway", "--redis", "redis://x", "--data-directory", "data"],
        ["up", "--redis", "redis://x", "--data-directory", "data"],
        ["chat", "hi", "--max-tokens", str(2**32)],
        ["sessions", "fork", "ses_a", "--at-turn", str(2**70)],
        ["sessions", "transcript", "ses_a", "--from-turn", str(2**70)],
        ["migrate", "ses_a", "--timeout", "inf"],
        ["migrate", "ses_a", "--timeout", "nan"],
        ["replicas", "drain", "r1", "--timeout", "1e300"],
        ["up", "--engine-option", "nonsense"],
        ["up", "--listen", "nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_use_ends_with_2(arguments: list[str]) -> None:
    assert sessile(None, *arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["sessions", "ls", "--tenant", "büro"],
        ["chat", "bytes \udcff"],
        ["chat", "hi", "--system", "\udcff"],
        ["replicas", "ls", "-g", ""],
    ],
    ids=ascii,
)
def test_what_cannot_be_sent_is_one_line_not_a_traceback(
    gateway: FakeGateway, arguments: list[str]
) -> None:
    gateway.answers.append(session_pb2.OpenSessionResponse(session=session()))
    shown = sessile(gateway, *arguments)
    assert shown.exit_code == 1, shown.output
    assert shown.stderr.startswith("error: ")


def test_chat_reads_text_only(gateway: FakeGateway) -> None:
    gateway.answers.append(session_pb2.OpenSessionResponse(session=session()))
    shown = CliRunner().invoke(app, ["chat", "-g", gateway.target], input=b"\xff\n")
    assert shown.exit_code == 1
    assert shown.stderr.startswith("error: the input is not text")


def test_a_model_without_a_usable_template_is_one_line_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(config: WorkerConfig, announce: Announce) -> None:
        raise ExceptionGroup("tasks", [TemplateRefused("it has no chat template; add one")])

    monkeypatch.setattr(workers.main, "run", refuse)
    shown = sessile(None, "worker", "--redis", "redis://x")
    assert shown.exit_code == 1
    assert shown.stderr == "error: it has no chat template; add one\n"


def test_a_report_that_cannot_be_written_is_told_before_the_demo_runs(tmp_path: Path) -> None:
    for out in (tmp_path / "missing" / "report.json", tmp_path):
        shown = sessile(None, "demo", "--engine", "sim", "--out", str(out))
        assert shown.exit_code == 1
        assert shown.stderr.startswith("error: ")
        assert shown.stdout == ""


def test_no_gateway_is_a_failure_not_a_traceback(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["replicas", "ls", "-g", f"unix://{tmp_path}/none"])
    assert shown.exit_code == 1
    assert shown.stderr.startswith("error: ")
    assert "sessile up" in shown.stderr


def test_a_store_of_an_unknown_kind_is_one_line_not_a_traceback() -> None:
    shown = CliRunner().invoke(app, ["gateway", "--redis", "http://x", "--listen", "127.0.0.1:0"])
    assert shown.exit_code == 2
    assert "a store URL begins with" in shown.stderr


def test_ctrl_c_counts_even_where_python_ignores_exceptions() -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupted = _Interrupted()
    try:
        interrupted.check()
        with contextlib.suppress(KeyboardInterrupt):  # as in a finaliser
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupted.check()
    finally:
        interrupted.close()
    assert signal.getsignal(signal.SIGINT) is before
