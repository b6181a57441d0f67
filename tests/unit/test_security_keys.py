"""API keys: shown once, kept as hashes, valid until they are revoked or expire."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.core.errors import InvalidRequest, PermissionDenied, SessileError, Unauthenticated
from gateway.rpc.auth import Bearer, HeaderTenant, authenticator_of
from gateway.security.access import Caller, Role
from gateway.security.config import GatewaySecurity
from gateway.security.keys import ApiKey, KeyRing, edited, load_keys, new_key

pytestmark = pytest.mark.anyio
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def added(file: Path, tenant: str, role: Role = Role.AGENT, expires: datetime | None = None) -> str:
    secret, key = new_key(tenant, role, NOW, expires)
    with edited(file) as keys:
        keys.append(key)
    return secret


def spoil(file: Path, content: str | None) -> None:
    file.unlink()
    if content is not None:
        file.write_text(content)


def bearer(file: Path, now: datetime = NOW) -> Bearer:
    security = GatewaySecurity(api_keys=file)
    return Bearer(security, check_interval_s=0.0, utc_now=lambda: now)


def shows(secret: str, tenant: str | None = None, scheme: str = "Bearer") -> dict[str, str]:
    named = {} if tenant is None else {"x-sessile-tenant": tenant}
    return {"authorization": f"{scheme} {secret}", **named}


def test_the_file_has_hashes_and_is_its_owners_only(file: Path) -> None:
    secret = added(file, "acme")
    assert secret not in file.read_text()
    assert secret.rpartition("-")[2] not in file.read_text()
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    (kept,) = load_keys(file)
    assert (kept.tenant, kept.role, kept.created, kept.expires) == ("acme", Role.AGENT, NOW, None)


def test_keys_are_random(file: Path) -> None:
    secrets = {new_key("t", Role.AGENT, NOW)[0] for _ in range(100)}
    assert len(secrets) == 100
    assert min(map(len, secrets)) == len("sk-") + 8 + 1 + 43, "256 bits of secret"


def test_only_the_whole_key_is_found() -> None:
    secret, key = new_key("acme", Role.AGENT, NOW)
    other, _ = new_key("acme", Role.AGENT, NOW)
    ring = KeyRing([key])
    assert ring.find(secret, NOW) is key
    wrong = [secret[:-1] + ("a" if secret[-1] != "a" else "b"), f"sk-{key.id}-{other[12:]}"]
    wrong += ["", "sk-", secret[3:], secret + "x", secret.upper(), key.sha256, other, "\0" * 55]
    assert [ring.find(one, NOW) for one in wrong] == [None] * len(wrong)


def test_an_unknown_id_is_compared_as_long_as_a_wrong_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import hmac

    compared: list[tuple[int, int]] = []

    def compare(left: str, right: str) -> bool:
        compared.append((len(left), len(right)))
        return False

    secret, key = new_key("acme", Role.AGENT, NOW)
    unknown, _ = new_key("acme", Role.AGENT, NOW)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring = KeyRing([key])
    for presented in (secret[:-2] + "aa", unknown):
        assert ring.find(presented, NOW) is None
    assert compared == [(64, 64), (64, 64)]


async def test_a_key_says_tenant_role_and_who(file: Path) -> None:
    agent, operator = added(file, "acme"), added(file, "ops", Role.OPERATOR)
    it = bearer(file)
    assert await it.caller(shows(agent)) == Caller("acme", Role.AGENT, agent[:11])
    assert await it.caller(shows(agent, "acme", scheme="bearer")) == Caller(
        "acme", Role.AGENT, agent[:11]
    )
    assert await it.caller(shows(operator)) == Caller("ops", Role.OPERATOR, operator[:11])
    assert await it.caller(shows(operator, "acme")) == Caller(
        "acme", Role.OPERATOR, operator[:11], foreign=True
    )
    with pytest.raises(PermissionDenied, match="another tenant"):
        await it.caller(shows(agent, "globex"))
    with pytest.raises(InvalidRequest):
        await it.caller(shows(operator, "no such name"))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"x-sessile-tenant": "acme"},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic c2stYTpi"},
        {"authorization": "Bearer sk-aaaaaaaa-" + "A" * 43},
        {"authorization": "Bearer eyJhbGciOiJub25lIn0.e30."},
    ],
)
async def test_without_a_valid_key_nobody_calls(file: Path, metadata: dict[str, str]) -> None:
    added(file, "acme")
    with pytest.raises(Unauthenticated) as refused:
        await bearer(file).caller(metadata)
    assert "acme" not in str(refused.value)


async def test_keys_are_rotated_without_a_restart(file: Path) -> None:
    old = added(file, "acme")
    it = bearer(file)
    new = added(file, "acme")
    for secret in (old, new):
        assert (await it.caller(shows(secret))).tenant == "acme"
    with edited(file) as keys:
        keys[:] = [key for key in keys if key.id != old[3:11]]
    assert (await it.caller(shows(new))).tenant == "acme"
    with pytest.raises(Unauthenticated):
        await it.caller(shows(old))


async def test_an_expired_key_is_like_an_unknown_one(file: Path) -> None:
    secret = added(file, "acme", expires=NOW + timedelta(days=1))
    assert await bearer(file, NOW + timedelta(hours=23)).caller(shows(secret))
    unknown, _ = new_key("acme", Role.AGENT, NOW)
    said = []
    for presented in (secret, unknown):
        with pytest.raises(SessileError) as refused:
            await bearer(file, NOW + timedelta(days=1)).caller(shows(presented))
        said.append((type(refused.value), refused.value.message, refused.value.hint))
    assert said[0] == said[1]


async def test_a_file_that_is_spoilt_leaves_the_keys_as_they_were(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = added(file, "acme")
    it = bearer(file)
    spoil(file, "[[keys]]\nid = 3\n")
    assert await it.caller(shows(secret))
    assert await it.caller(shows(secret))
    assert caplog.text.count("cannot be used") == 1
    spoil(file, None)
    assert await it.caller(shows(secret))
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("keys = 3", "holds"),
        ("[other]", "holds"),
        ("[[keys]]\nid = 'a'", "sha256 is missing"),
        ("[[keys]", "no file of keys"),
        ("[[keys]]\nid='a'\nsecret='x'", "unknown secret"),
    ],
)
def test_a_file_that_is_wrong_is_refused_at_start(file: Path, content: str, says: str) -> None:
    file.write_text(content)
    with pytest.raises(ValueError, match=says):
        authenticator_of(GatewaySecurity(api_keys=file))


def test_without_settings_the_header_is_believed() -> None:
    assert isinstance(authenticator_of(GatewaySecurity()), HeaderTenant)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


async def test_the_command_makes_lists_and_revokes(file: Path) -> None:
    secret = run("create", "--file", str(file), "--tenant", "acme", "--note", 'the "CI"').strip()
    other = json.loads(
        run("create", "--file", str(file), "--role", "operator", "--expires-days", "0", "--json")
    )["key"]
    it = Bearer(GatewaySecurity(api_keys=file), check_interval_s=0.0)
    assert (await it.caller(shows(secret))).tenant == "acme"
    with pytest.raises(Unauthenticated):
        await it.caller(shows(other))
    listed = run("list", "--file", str(file))
    assert secret[:11] in listed
    assert 'the "CI"' in listed
    assert secret not in listed
    states = {
        key["id"]: key["state"] for key in json.loads(run("list", "--file", str(file), "--json"))
    }
    assert states == {secret[:11]: "valid", other[:11]: "expired"}
    assert "no key" in run("revoke", "--file", str(file), other, "nobody", code=1)
    run("revoke", "--file", str(file), secret[:11])
    with pytest.raises(Unauthenticated):
        await it.caller(shows(secret))
    assert [key.id for key in load_keys(file)] == [other[3:11]]


def test_tenants_that_cannot_be_are_refused(file: Path) -> None:
    assert "1 to 64" in run("create", "--file", str(file), "--tenant", "a b", code=1)
    assert not file.exists()


def test_a_key_keeps_what_it_was_made_with(file: Path) -> None:
    made = ApiKey("aaaaaaaa", "0" * 64, "t", Role.OPERATOR, NOW, NOW + timedelta(days=2), 'x\n"y"')
    with edited(file) as keys:
        keys.append(made)
    assert load_keys(file) == (made,)
