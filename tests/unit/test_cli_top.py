"""``sessile top``: what a picture of the fleet shows, and in which order."""

from __future__ import annotations

import json

from rich.console import Console
from sessile import Replica, SessionInfo
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.cli.top import Order, ordered, picture
from tests.support.fake_gateway import gateway_in_a_thread, listing, place, session


def sessions() -> list[SessionInfo]:
    owner = pb.Owner(replica=pb.ReplicaRef(replica_id="r1", incarnation=1))
    found = [
        session("ses_b", head=place(5), turn_index=9, updated_at_unix_ms=3),
        session("ses_a", head=place(7), turn_index=1, updated_at_unix_ms=2, active_turn_id="t"),
        session("ses_c", head=place(5), turn_index=2, updated_at_unix_ms=1, owner=owner),
    ]
    return [SessionInfo.from_pb(one) for one in found]


def test_sessions_are_in_the_order_that_was_asked_for() -> None:
    names = {
        order: "".join(info.session_id[-1] for info in ordered(sessions(), order))
        for order in Order
    }
    assert names == {
        Order.UPDATED: "bac", Order.TOKENS: "abc", Order.TURNS: "bca", Order.BUSY: "abc",
    }  # fmt: skip


def test_a_picture_has_sums_replicas_and_sessions() -> None:
    replicas = [Replica.from_pb(one) for one in listing("r1", "r2").replicas]
    console = Console(width=160)
    with console.capture() as shown:
        console.print(picture(replicas, sessions()))
    text = shown.get()
    assert "2 replicas, 0 turns run, 0 wait, 0 tok/s" in text
    for words in ("r1", "r2", "20/100", "ses_a", "busy", "open"):
        assert words in text


def test_one_picture_for_scripts() -> None:
    with gateway_in_a_thread() as gateway:
        found = session_pb2.ListSessionsResponse(sessions=[session("ses_a")])
        gateway.answers += [listing("r1"), found, listing("r1"), found]
        arguments = ["top", "--once", "--gateway", gateway.target]
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.output
        assert "ses_a" in shown.stdout
        told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [one["ref"]["replica_id"] for one in told["replicas"]] == ["r1"]
    assert [one["session_id"] for one in told["sessions"]] == ["ses_a"]
