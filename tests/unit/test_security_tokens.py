"""JSON Web Tokens: only those of the issuer, for this audience, by an allowed public key."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from gateway.core.errors import PermissionDenied, SessileError, Unauthenticated
from gateway.rpc.auth import Bearer
from gateway.security.access import Caller, Role
from gateway.security.config import GatewaySecurity, JwtConfig
from gateway.security.tokens import Holder, Tokens

pytestmark = pytest.mark.anyio
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
ISSUER, AUDIENCE = "https://id.example.com", "sessile"


def jwk(kid: str, public: Any, **more: str) -> dict[str, Any]:
    kinds: dict[Any, tuple[Any, str]] = {
        rsa.RSAPublicKey: (RSAAlgorithm, "RS256"),
        ec.EllipticCurvePublicKey: (ECAlgorithm, "ES256"),
        ed25519.Ed25519PublicKey: (OKPAlgorithm, "EdDSA"),
    }
    for kind, (algorithm, name) in kinds.items():
        if isinstance(public, kind):
            values = json.loads(algorithm.to_jwk(public))
            return {**values, "kid": kid, "alg": name, "use": "sig", **more}
    raise AssertionError(public)


ROLES: dict[str, Any] = {"https://sessile/roles": ["operator"]}
KEYS = [
    jwk("rsa", RSA.public_key()),
    jwk("ec", EC.public_key()),
    jwk("ed", ED.public_key()),
]


@pytest.fixture
def jwks(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    publish(path, *KEYS)
    return path


def publish(path: Path, *keys: dict[str, Any]) -> None:
    path.write_text(json.dumps({"keys": keys}))


def tokens(path: Path, **more: Any) -> Tokens:
    return Tokens(JwtConfig(path, ISSUER, AUDIENCE, **more), check_interval_s=0.0)


def claims(**more: Any) -> dict[str, Any]:
    now = int(time.time())
    base = {"iss": ISSUER, "aud": AUDIENCE, "exp": now + 600, "sub": "bot-7", "tenant": "acme"}
    return {name: value for name, value in {**base, **more}.items() if value is not None}


def signed(key: Any = RSA, algorithm: str = "RS256", kid: str | None = "rsa", **more: Any) -> str:
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(claims(**more), key, algorithm=algorithm, headers=headers)


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"), [(RSA, "RS256", "rsa"), (EC, "ES256", "ec"), (ED, "EdDSA", "ed")]
)
def test_every_allowed_signature_is_taken(jwks: Path, key: Any, algorithm: str, kid: str) -> None:
    expires = int(time.time()) + 600
    holder = tokens(jwks, leeway_s=5.0).holder(signed(key, algorithm, kid, exp=expires))
    assert holder == Holder("acme", Role.AGENT, "bot-7", expires + 5.0)


@pytest.mark.parametrize(
    ("role", "found"),
    [
        (None, Role.AGENT),
        ("agent", Role.AGENT),
        ("operator", Role.OPERATOR),
        (["agent", "operator"], Role.OPERATOR),
        (["reader", "agent"], Role.AGENT),
    ],
)
def test_roles(jwks: Path, role: Any, found: Role) -> None:
    assert tokens(jwks).holder(signed(role=role)).role is found


@pytest.mark.parametrize("role", ["admin", ["reader"], [], 7, ""])
def test_an_unknown_role_is_no_role(jwks: Path, role: Any) -> None:
    with pytest.raises(Unauthenticated, match="role"):
        tokens(jwks).holder(signed(role=role))


def test_claims_may_have_other_names_and_places(jwks: Path) -> None:
    it = tokens(jwks, tenant_claim="org.slug", role_claim="https://sessile/roles")
    token = signed(tenant=None, org={"slug": "globex"}, **ROLES)
    holder = it.holder(token)
    assert (holder.tenant, holder.role, holder.name) == ("globex", Role.OPERATOR, "bot-7")


PEM = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _forged(header: dict[str, Any], secret: bytes) -> str:
    """What PyJWT itself would not sign."""
    import base64
    import hashlib
    import hmac

    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    body = f"{part(json.dumps(header).encode())}.{part(json.dumps(claims()).encode())}"
    return f"{body}.{part(hmac.digest(secret, body.encode(), hashlib.sha256))}"


BAD: dict[str, Callable[[], str]] = {
    "none": lambda: jwt.encode(claims(), "", algorithm="none", headers={"kid": "rsa"}),
    "a public key taken for a secret": lambda: _forged({"alg": "HS256", "kid": "rsa"}, PEM),
    "another key": lambda: signed(rsa.generate_private_key(public_exponent=65537, key_size=2048)),
    "another algorithm of the key": lambda: signed(RSA, "PS256"),
    "the key of another kid": lambda: signed(kid="ec"),
    "an unknown kid": lambda: signed(kid="new"),
    "no kid among several keys": lambda: signed(kid=None),
    "expired": lambda: signed(exp=int(time.time()) - 60),
    "without exp": lambda: signed(exp=None),
    "not valid yet": lambda: signed(nbf=int(time.time()) + 600),
    "another issuer": lambda: signed(iss="https://evil.example.com"),
    "without issuer": lambda: signed(iss=None),
    "another audience": lambda: signed(aud="billing"),
    "without audience": lambda: signed(aud=None),
    "without tenant": lambda: signed(tenant=None),
    "a tenant that is no text": lambda: signed(tenant=["acme"]),
    "a changed payload": lambda: ".".join(
        [signed().split(".")[0], signed(tenant="globex").split(".")[1], signed().split(".")[2]]
    ),
    "no token": lambda: "abc",
    "three empty parts": lambda: "..",
    "too long": lambda: signed(pad="x" * 9000),
    "an own key in the header": lambda: jwt.encode(
        claims(), EC, algorithm="ES256", headers={"jwk": jwk("x", EC.public_key())}
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_others_are_refused_and_nothing_of_them_is_said(jwks: Path, case: str) -> None:
    token = BAD[case]()
    with pytest.raises(Unauthenticated) as refused:
        tokens(jwks).holder(token)
    for part in filter(None, (*token.split("."), "acme", "globex", "evil")):
        assert len(part) < 5 or part not in refused.value.message


def test_clocks_may_differ_by_the_leeway(jwks: Path) -> None:
    late = signed(exp=int(time.time()) - 5)
    assert tokens(jwks, leeway_s=30.0).holder(late)
    with pytest.raises(Unauthenticated, match="expired"):
        tokens(jwks, leeway_s=1.0).holder(late)


def test_a_token_is_verified_once_and_holds_until_it_expires(
    jwks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    decode = jwt.decode

    def counted(token: str, *given: Any, **more: Any) -> Any:
        verified.append(token)
        return decode(token, *given, **more)

    monkeypatch.setattr(jwt, "decode", counted)
    now = [time.time()]
    config = JwtConfig(jwks, ISSUER, AUDIENCE, leeway_s=0.0)
    it = Tokens(config, check_interval_s=0.0, unix_now=lambda: now[0])
    token = signed(exp=int(now[0]) + 60)
    expected = Holder("acme", Role.AGENT, "bot-7", int(now[0]) + 60)
    assert it.holder(token) == it.holder(token) == expected
    assert len(verified) == 1
    now[0] += 61
    it.holder(token)  # the library's own clock decides from here on
    assert len(verified) == 2
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            it.holder(token[:-4] + "AAAA")
    assert len(verified) == 4, "what was refused is not remembered"


def test_tokens_that_are_remembered_are_bounded(
    jwks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.security.tokens.MAX_REMEMBERED", 3)
    it = tokens(jwks)
    for number in range(6):
        assert it.holder(signed(ED, "EdDSA", "ed", n=number))
    assert len(it._known) == 3


def test_a_single_key_needs_no_kid(jwks: Path) -> None:
    publish(jwks, KEYS[0])
    assert tokens(jwks).holder(signed(kid=None))


def test_keys_are_rotated_without_a_restart(jwks: Path) -> None:
    it = tokens(jwks)
    new = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with pytest.raises(Unauthenticated):
        it.holder(signed(new, kid="rsa-2"))
    publish(jwks, KEYS[0], jwk("rsa-2", new.public_key()))
    assert it.holder(signed(new, kid="rsa-2"))
    assert it.holder(signed())
    publish(jwks, jwk("rsa-2", new.public_key()))
    with pytest.raises(Unauthenticated):
        it.holder(signed())


def test_a_key_set_that_is_spoilt_leaves_the_keys_as_they_were(jwks: Path) -> None:
    it = tokens(jwks)
    jwks.write_text("{}")
    assert it.holder(signed())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"keys": []}',
        '{"keys": [{"kty": "oct", "k": "c2VjcmV0", "alg": "HS256", "kid": "s"}]}',
        '{"keys": [3]}',
    ],
)
def test_a_key_set_without_a_public_key_is_refused(jwks: Path, content: str) -> None:
    jwks.write_text(content)
    with pytest.raises(ValueError, match=r"jwks\.json"):
        tokens(jwks)


@pytest.mark.parametrize("algorithms", [("HS256",), ("none",), ("RS256", "HS512"), ()])
def test_shared_secrets_cannot_be_allowed(algorithms: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="algorithms"):
        JwtConfig(Path("x"), ISSUER, AUDIENCE, algorithms)


async def test_tokens_and_keys_may_be_used_side_by_side(jwks: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.touch()
    it = Bearer(GatewaySecurity(api_keys=keys, jwt=JwtConfig(jwks, ISSUER, AUDIENCE)))
    say = {"authorization": f"Bearer {signed(role='operator')}", "x-sessile-tenant": "globex"}
    assert await it.caller(say) == Caller("globex", Role.OPERATOR, "bot-7", foreign=True)
    with pytest.raises(PermissionDenied):
        await it.caller({**say, "authorization": f"Bearer {signed()}"})
    with pytest.raises(SessileError, match="API key"):
        await it.caller({"authorization": "Bearer sk-aaaaaaaa-" + "a" * 43})
