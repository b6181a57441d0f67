"""What the client shows to gateways, and that it repeats no secret."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import sessile
from sessile import InvalidRequest, RetryPolicy, Runtime, Sessile, Unauthenticated, sync
from sessile.credentials import authorization, channel_credentials
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core import errors
from tests.support.certificates import Authority
from tests.support.fake_gateway import (
    Fail,
    FakeGateway,
    accepted,
    finished,
    listing,
    serving,
    session,
    tokens,
)

pytestmark = pytest.mark.anyio
KEY = "sk-aaaaaaaa-" + "s3cret" * 7


def shown(**given: Any) -> dict[str, str]:
    environment = given.pop("environment", {})
    return dict(authorization(given.get("api_key"), given.get("token"), environment)())


def test_a_key_or_a_token_is_a_bearer() -> None:
    assert shown() == {}
    assert shown(api_key=KEY) == {"authorization": f"Bearer {KEY}"}
    assert shown(token="e.y.J") == {"authorization": "Bearer e.y.J"}
    environment = {"SESSILE_API_KEY": KEY}
    assert shown(environment=environment) == {"authorization": f"Bearer {KEY}"}
    assert shown(token="e.y.J", environment=environment) == {"authorization": "Bearer e.y.J"}
    assert shown(environment={"SESSILE_API_KEY": ""}) == {}


def test_a_token_is_asked_for_with_each_call() -> None:
    fresh = iter(["one", "two"])
    metadata = authorization(None, lambda: next(fresh), {})
    assert [metadata(), metadata()] == [
        (("authorization", "Bearer one"),),
        (("authorization", "Bearer two"),),
    ]


@pytest.mark.parametrize("secret", ["", " ", "two words", "gehéim", "a\nb", None, 7])
def test_what_cannot_be_sent_is_refused_and_not_repeated(secret: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        authorization(None, lambda: secret, {})()
    assert str(secret).strip() in ("", "7") or str(secret) not in str(refused.value)


def test_contradictions_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="both"):
        Sessile("127.0.0.1:1", api_key=KEY, token="t")
    with pytest.raises(InvalidRequest, match="both"):
        Sessile("127.0.0.1:1", tls=True, credentials=channel_credentials(True, None, {}))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        sync.Sessile("127.0.0.1:1", tls="/no/such/file")
    with pytest.raises(InvalidRequest) as refused:
        Sessile("127.0.0.1:1", metadata=[("authorization", "Bearer gehéim")])
    assert "gehéim" not in str(refused.value)


def test_tls_may_come_from_the_environment(tmp_path: Path) -> None:
    ca = Authority(tmp_path / "pki").certificate
    assert channel_credentials(None, None, {}) is None
    assert channel_credentials(None, None, {"SESSILE_TLS": "0"}) is None
    assert channel_credentials(False, None, {"SESSILE_TLS": "1"}) is None
    for tls in (True, ca, str(ca)):
        assert channel_credentials(tls, None, {}) is not None
    for value in ("1", str(ca)):
        assert channel_credentials(None, None, {"SESSILE_TLS": value}) is not None


@pytest.mark.parametrize(
    ("target", "given", "warned"),
    [
        ("gateway:8470", {"api_key": KEY}, True),
        ("gateway:8470", {"token": lambda: "t"}, True),
        ("gateway:8470", {}, False),
        ("gateway:8470", {"api_key": KEY, "tls": True}, False),
        ("127.0.0.1:8470", {"api_key": KEY}, False),
        ("localhost:8470", {"api_key": KEY}, False),
    ],
)
def test_a_secret_in_plain_text_is_worth_a_word(
    target: str, given: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    Sessile(target, **given)
    assert ("without TLS" in caplog.text) is warned
    assert KEY not in caplog.text


async def test_tenant_and_credentials_go_with_every_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as gateway:
        gateway.answers.extend([listing("r1"), listing("r1")])
        async with Sessile(gateway.target) as client:
            await client.fleet.replicas()
        async with Sessile(gateway.target, tenant="acme", api_key=KEY) as client:
            await client.fleet.replicas()
    assert gateway.tenants == ["None", "acme"], "only who names a tenant sends one"
    assert gateway.authorizations == ["None", f"Bearer {KEY}"]
    assert KEY not in caplog.text
    assert issubclass(sessile.Unauthenticated, sessile.AccessDenied)
    assert issubclass(sessile.PermissionDenied, sessile.AccessDenied)


ENDED = Fail(
    errors.Unauthenticated("the token has expired", reason="CREDENTIALS_ENDED", hint="attach again")
)


async def no_wait(seconds: float) -> None:
    del seconds


def renewing(gateway: FakeGateway, *given: str, retry: RetryPolicy | None = None) -> Sessile:
    source = iter(given)
    return Sessile(
        gateway.target, token=lambda: next(source), runtime=Runtime(sleep=no_wait), retry=retry
    )


async def test_a_stream_goes_on_with_a_new_token_when_its_own_expires() -> None:
    async with serving() as gateway:
        gateway.turns.append([accepted(), tokens(0), ENDED])
        gateway.turns.append([accepted(attached=True), tokens(2), finished(4)])
        async with renewing(gateway, "one", "two") as client:
            result = await client.session("ses_a").run("hi", turn_id="t1").result()
        assert (result.token_ids, result.reconnects) == ((100, 101, 102, 103), 1)
        again = gateway.requests(pb.RunTurnRequest)[1]
        assert again.attach_only
        gateway.answers.append(session_pb2.WatchSessionResponse(session=session()))
        gateway.answers.append(ENDED)
        async with renewing(gateway, "three", "four") as client:
            seen = [info async for info in client.session("ses_a").watch()]
    assert [info.session_id for info in seen] == ["ses_a"]
    assert gateway.authorizations == [f"Bearer {one}" for one in ("one", "two", "three", "four")]


async def test_tokens_that_always_end_at_once_are_given_up() -> None:
    async with serving() as gateway:
        gateway.turns.extend([[accepted(), ENDED]] * 3)
        many = (str(number) for number in range(9))
        async with renewing(gateway, *many, retry=RetryPolicy(max_attempts=3)) as client:
            with pytest.raises(Unauthenticated, match="expired"):
                await client.session("ses_a").run("hi", turn_id="t1").result()
    assert not gateway.turns


async def test_a_key_that_was_revoked_is_not_shown_again() -> None:
    async with serving() as gateway:
        gateway.turns.append([accepted(), tokens(0), ENDED])
        async with Sessile(gateway.target, api_key=KEY) as client:
            with pytest.raises(Unauthenticated) as ended:
                await client.session("ses_a").run("hi", turn_id="t1").result()
    assert (ended.value.reason, gateway.authorizations) == ("CREDENTIALS_ENDED", [f"Bearer {KEY}"])
    assert "attach" in ended.value.hint
