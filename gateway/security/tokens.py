"""JSON Web Tokens: whose are believed, and what they say of their caller."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from gateway.core.errors import Unauthenticated
from gateway.security.access import Role, checked_tenant
from gateway.security.config import JwtConfig
from gateway.security.reload import CHECK_INTERVAL_S, Reloaded, read

log = logging.getLogger(__name__)

MAX_TOKEN_CHARS = 8192
MAX_NAME_CHARS = 128
MAX_REMEMBERED = 4096
"""Tokens whose signature was checked already; the least recently used goes first. A check takes a
fraction of a millisecond of the event loop, and agents send the same token with each call."""

_KeySet = Mapping[str, jwt.PyJWK]


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose a token is."""

    tenant: str
    role: Role
    name: str
    """The token's subject."""
    expires_at: float
    """Unix seconds from which on the token is refused: ``exp`` and the leeway."""


class Tokens:
    """Checks tokens against one issuer's key set. Raises OSError or ValueError for a key set that
    cannot be used."""

    def __init__(
        self,
        config: JwtConfig,
        *,
        check_interval_s: float = CHECK_INTERVAL_S,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._unix_now = unix_now
        self._known: OrderedDict[bytes, tuple[float, Holder]] = OrderedDict()
        """Of the key set ``_known_to``: SHA-256 of a token, until when it holds, and for whom."""
        self._known_to: _KeySet | None = None
        self._keys = Reloaded([config.jwks], self._load, check_interval_s=check_interval_s)

    @property
    def generation(self) -> int:
        """Changes when the issuer's keys were read again."""
        self._keys.current()
        return self._keys.generation

    def holder(self, token: str) -> Holder:
        """Raises Unauthenticated with the reason and nothing of the token."""
        keys = self._keys.current()
        if keys is not self._known_to:  # what other keys have signed is checked anew
            self._known.clear()
            self._known_to = keys
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        expires_at, holder = self._known.get(digest, (0.0, None))
        if holder is not None and self._unix_now() < expires_at:
            self._known.move_to_end(digest)
            return holder
        claims = self._claims(token, keys)
        expires_at = float(claims["exp"])
        holder = self._holder(claims, expires_at + self._config.leeway_s)
        self._known[digest] = expires_at, holder
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return holder

    def _holder(self, claims: Mapping[str, Any], expires_at: float) -> Holder:
        tenant = _claim(claims, self._config.tenant_claim)
        if not isinstance(tenant, str):
            raise _refused(f"it names no tenant ({self._config.tenant_claim})")
        roles = _claim(claims, self._config.role_claim)
        named = roles if isinstance(roles, list) else [roles]
        role = Role.OPERATOR if Role.OPERATOR in named else Role.AGENT
        if roles is not None and role not in named:
            raise _refused(f"it names no role that is known ({self._config.role_claim})")
        name = str(claims.get("sub", ""))[:MAX_NAME_CHARS]
        return Holder(checked_tenant(tenant), role, name, expires_at)

    def _claims(self, token: str, keys: _KeySet) -> Mapping[str, Any]:
        config = self._config
        if len(token) > MAX_TOKEN_CHARS:
            raise _refused("it is too long")
        try:
            header = jwt.get_unverified_header(token)
            key_id = header.get("kid")
            if key_id is None and len(keys) == 1:
                key = next(iter(keys.values()))
            else:
                key = keys[key_id] if isinstance(key_id, str) else keys[""]
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                # Both must allow it: the settings, and the key, which is for one only.
                algorithms=[name for name in config.algorithms if name == key.algorithm_name],
                audience=config.audience,
                issuer=config.issuer,
                leeway=config.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except KeyError as error:
            raise _refused("its key is not among the issuer's") from error
        except jwt.ExpiredSignatureError as error:
            raise _refused("it has expired") from error
        except jwt.ImmatureSignatureError as error:
            raise _refused("it is not valid yet") from error
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError) as error:
            raise _refused("it is from or for somebody else") from error
        except jwt.MissingRequiredClaimError as error:
            raise _refused("exp, iss or aud is missing") from error
        except jwt.PyJWTError as error:
            raise _refused("its signature or form is wrong") from error
        return claims

    def _load(self) -> _KeySet:
        try:
            content = json.loads(read(self._config.jwks))
            keys = [key for key in map(_key, content["keys"]) if key is not None]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self._config.jwks} is no JSON Web Key Set: {error}") from error
        usable = {
            key.key_id or "": key
            for key in keys
            if key.key_type != "oct" and key.algorithm_name in self._config.algorithms
        }
        if not usable:
            allowed = ", ".join(self._config.algorithms)
            raise ValueError(f"{self._config.jwks} has no public key for {allowed}")
        return usable


def _key(values: Any) -> jwt.PyJWK | None:
    """None for a key of a kind that is not known, or not for signatures: sets hold such, too."""
    if not isinstance(values, dict) or values.get("use", "sig") != "sig":
        return None
    try:
        return jwt.PyJWK.from_dict(values)
    except jwt.PyJWTError as error:
        log.info("a key of the set is left out: %s", error)
        return None


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """The claim of that very name, or along the dots."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(f"the token is not accepted: {why}")
