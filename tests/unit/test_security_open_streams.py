"""Open streams end with the credentials that they were opened with, and no others do."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest
from google.protobuf.message import Message
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.admission import Gate
from gateway.core.errors import Unauthenticated
from gateway.rpc.auth import Bearer
from gateway.rpc.open_streams import OpenStreams
from gateway.rpc.serving import Serving
from gateway.security.access import Caller, Role
from gateway.security.audit import AuditLog
from gateway.security.config import GatewaySecurity
from gateway.security.keys import ApiKey, edited, new_key
from loadtest.simulation.loop import run
from tests.support.wire import Answer, Wire

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SOON_S = 1.1
"""Longer than files go unlooked at."""
LONG_S = 3600.0


@dataclass
class Streams:
    """A server with one relayed call and one watch that never end, and what became of calls."""

    keys: Path
    wire: Wire
    tasks: anyio.abc.TaskGroup
    answers: dict[tuple[str, str], Answer] = field(default_factory=dict)
    """By the key's name and the call, once it has ended."""
    running: int = 0

    def add(self, tenant: str = "acme", role: Role = Role.AGENT) -> str:
        secret, key = new_key(tenant, role, NOW)
        with edited(self.keys) as keys:
            keys.append(key)
        return secret

    def change(self, secret: str, **fields: Any) -> None:
        with edited(self.keys) as keys:
            keys[:] = [replace(k, **fields) if secret[3:11] == k.id else k for k in keys]

    def revoke(self, secret: str) -> None:
        with edited(self.keys) as keys:
            keys[:] = [key for key in keys if key.id != secret[3:11]]

    async def open(
        self,
        name: str,
        secret: str,
        tenant: str | None = None,
        sent: anyio.Event | None = None,
    ) -> None:
        """One stream of each kind; their requests come when ``sent`` is set."""
        shown = [("authorization", f"Bearer {secret}")]
        shown += [] if tenant is None else [("x-sessile-tenant", tenant)]

        async def call(method: str, request: Message) -> None:
            data = request.SerializeToString()
            answer = await self.wire.call(
                f"/t/{method}", data, metadata=shown, patience_s=10 * LONG_S, sent=sent
            )
            self.answers[name, method] = answer

        self.tasks.start_soon(call, "Run", pb.RunTurnRequest(session_id="ses_a"))
        self.tasks.start_soon(call, "Watch", session_pb2.WatchSessionRequest(session_id="ses_a"))
        before = self.running
        await anyio.sleep(0.1)
        assert self.running == before + (2 if sent is None else 0)

    def ended(self, name: str) -> list[Answer]:
        return [answer for (who, _), answer in self.answers.items() if who == name]


@asynccontextmanager
async def streams(keys: Path, audit: Path | None = None) -> AsyncGenerator[Streams, None]:
    secret, key = new_key("nobody", Role.AGENT, NOW)
    del secret
    with edited(keys) as kept:
        kept.append(key)
    gate = Gate("max_watches", 99, 1)
    bearer = Bearer(GatewaySecurity(api_keys=keys), check_interval_s=0.0)
    serving = Serving(bearer, gate, gate, audit=AuditLog(audit))
    async with anyio.create_task_group() as tasks:
        it = Streams(keys, Wire(), tasks)

        async def turn(
            tenant: str,
            request: Any,
            left_s: float | None,
            sink: Callable[[bytes], Awaitable[None]],
        ) -> None:
            del tenant, request, left_s
            it.running += 1
            try:
                await sink(b"first")
                await anyio.sleep_forever()
            finally:
                it.running -= 1

        async def watch(tenant: str, request: Any) -> AsyncGenerator[Message, None]:
            del tenant, request
            it.running += 1
            try:
                yield session_pb2.WatchSessionResponse()
                await anyio.sleep_forever()
            finally:
                it.running -= 1

        methods = {
            "Run": serving.relayed(turn, pb.RunTurnRequest),
            "Watch": serving.streaming(watch, session_pb2.WatchSessionRequest),
        }
        it.wire.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", methods),))
        tasks.start_soon(serving.run)
        yield it
        assert len(serving._streams._open) == it.running
        tasks.cancel_scope.cancel()
    assert it.running == 0
    assert not serving._streams._open


def test_a_revoked_key_ends_its_streams_and_no_others(tmp_path: Path) -> None:
    async def main() -> None:
        async with streams(tmp_path / "keys.toml") as it:
            old, new, other = it.add(), it.add(), it.add("globex")
            for name, secret in (("old", old), ("new", new), ("other", other)):
                await it.open(name, secret)
            await anyio.sleep(LONG_S)
            assert not it.answers, "a rotation under way: old and new are valid"
            it.revoke(old)
            await anyio.sleep(SOON_S)
            assert it.answers.keys() == {("old", "Run"), ("old", "Watch")}
            for answer in it.ended("old"):
                assert answer.unexpected is None
                assert answer.code is grpc.StatusCode.UNAUTHENTICATED
                assert answer.reason == "CREDENTIALS_ENDED"
                assert "revoked" in answer.message
                assert "attach" in answer.hint
                assert len(answer.responses) == 1, "what was sent before stays sent"
                assert old not in f"{answer.message} {answer.hint}"
            await anyio.sleep(LONG_S)
            assert it.running == 4
            await it.open("again", new)

    run(main, seed=1)


def test_a_key_that_is_revoked_before_the_request_has_come_opens_no_stream(tmp_path: Path) -> None:
    async def main() -> None:
        async with streams(tmp_path / "keys.toml") as it:
            secret, sent = it.add(), anyio.Event()
            await it.open("other", it.add())
            await it.open("it", secret, sent=sent)
            it.revoke(secret)
            await anyio.sleep(SOON_S)
            sent.set()
            await anyio.sleep(SOON_S)
            assert {answer.reason for answer in it.ended("it")} == {"CREDENTIALS_ENDED"}
            assert it.running == 2, "the other's"

    run(main, seed=1)


@pytest.mark.parametrize("fields", [{"tenant": "globex"}, {"role": Role.OPERATOR}])
def test_a_key_that_is_for_somebody_else_now_ends_its_streams(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        async with streams(tmp_path / "keys.toml") as it:
            secret = it.add()
            await it.open("it", secret)
            it.change(secret, note="of another person")
            await anyio.sleep(SOON_S)
            assert not it.answers
            it.change(secret, **fields)
            await anyio.sleep(SOON_S)
            assert {answer.reason for answer in it.ended("it")} == {"CREDENTIALS_ENDED"}

    run(main, seed=1)


def test_who_acts_for_a_tenant_stops_when_it_may_not_any_more(tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    async def main() -> None:
        async with streams(tmp_path / "keys.toml", audit) as it:
            secret = it.add("ops", Role.OPERATOR)
            await it.open("it", secret, tenant="acme")
            it.change(secret, role=Role.AGENT)
            await anyio.sleep(SOON_S)
            assert {answer.reason for answer in it.ended("it")} == {"CREDENTIALS_ENDED"}

    run(main, seed=1)
    outcomes = [json.loads(line)["outcome"] for line in audit.read_text().splitlines()]
    assert sorted(outcomes) == ["BEGUN"] * 2 + ["CREDENTIALS_ENDED"] * 2


def test_a_spoilt_file_of_keys_ends_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with streams(tmp_path / "keys.toml") as it:
            await it.open("it", it.add())
            it.keys.write_text("[[keys]]\nid = 3\n")
            await anyio.sleep(SOON_S)
            it.keys.unlink()
            await anyio.sleep(SOON_S)
            assert not it.answers

    run(main, seed=1)


class Desk:
    """Accepts everybody until ``expires_at``."""

    def __init__(self, expires_at: float | None) -> None:
        self.expires_at = expires_at
        self.generation = 0
        self.asked = 0

    async def caller(self, metadata: Mapping[str, str]) -> Caller:
        del metadata
        self.asked += 1
        if self.expires_at is None:
            raise Unauthenticated("nobody")
        return Caller("acme", Role.AGENT, "bot", expires_at=self.expires_at)


START = 1_900_000_000.0
"""Unix seconds when the loop's clock is at zero."""


def unix_now() -> float:
    return START + anyio.current_time()


async def opened(desk: Desk, began: float) -> float:
    """How long a stream lasted that would go on for LONG_S."""
    open_streams = OpenStreams(desk, unix_now=unix_now)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_streams.run)
        await anyio.sleep(began)
        try:
            with open_streams.entered(await desk.caller({}), {}):
                await anyio.sleep(LONG_S)
        except Unauthenticated:
            assert not open_streams._open
        tasks.cancel_scope.cancel()
    return anyio.current_time() - began


@pytest.mark.parametrize(
    ("expires_at", "lasts_s"),
    [(START + 610, 600.0), (START + 5, 0.0), (START + 2 * LONG_S, LONG_S), (1e300, LONG_S)],
)
def test_a_stream_ends_when_its_token_expires(expires_at: float, lasts_s: float) -> None:
    async def main() -> None:
        assert await opened(Desk(expires_at), began=10) == pytest.approx(lasts_s)

    run(main, seed=1)


def test_a_key_whose_life_is_prolonged_keeps_its_streams() -> None:
    async def main() -> None:
        desk = Desk(START + 600)

        async def prolong() -> None:
            await anyio.sleep(300)
            desk.expires_at, desk.generation = START + 900, 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(prolong)
            assert await opened(desk, began=0) == pytest.approx(900)

    run(main, seed=1)


def test_nothing_is_checked_again_while_no_key_changes() -> None:
    desk = Desk(START + 2 * LONG_S)

    async def main() -> None:
        await opened(desk, began=0)

    run(main, seed=1)
    assert desk.asked == 1


def test_a_failure_of_the_stream_itself_is_told_as_it_is() -> None:
    async def main() -> None:
        desk = Desk(START + 60)
        open_streams = OpenStreams(desk, unix_now=unix_now)
        with pytest.raises(KeyError), open_streams.entered(await desk.caller({}), {}):
            raise KeyError
        assert not open_streams._open

    run(main, seed=1)


def test_a_kept_key_says_when_it_expires(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    secret, key = new_key("acme", Role.AGENT, NOW, datetime(2100, 1, 1, tzinfo=UTC))
    eternal_secret, eternal = new_key("acme", Role.AGENT, NOW)

    async def main() -> None:
        def add(*more: ApiKey) -> None:
            with edited(file) as keys:
                keys.extend(more)

        add(key, eternal)
        bearer = Bearer(GatewaySecurity(api_keys=file), check_interval_s=0.0)
        assert bearer.generation == 0
        found = await bearer.caller({"authorization": f"Bearer {secret}"})
        assert found.expires_at == datetime(2100, 1, 1, tzinfo=UTC).timestamp()
        found = await bearer.caller({"authorization": f"Bearer {eternal_secret}"})
        assert found.expires_at is None
        add(new_key("acme", Role.AGENT, NOW)[1])
        assert bearer.generation == bearer.generation == 1

    run(main, seed=1)
