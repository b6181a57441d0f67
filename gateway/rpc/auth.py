"""Who calls: a port, and its adapters for the plain header, API keys and JSON Web Tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Protocol

from gateway.core.errors import Unauthenticated
from gateway.security.access import (
    DEFAULT_TENANT,
    TENANT_HEADER,
    Caller,
    Role,
    acting_for,
    checked_tenant,
)
from gateway.security.config import GatewaySecurity
from gateway.security.keys import PREFIX, KeyRing, load_keys
from gateway.security.reload import CHECK_INTERVAL_S, Reloaded
from gateway.security.tokens import Tokens

AUTHORIZATION = "authorization"
_SCHEME = "bearer "


class Authenticator(Protocol):
    """Maps a call's metadata to its caller."""

    async def caller(self, metadata: Mapping[str, str]) -> Caller:
        """Raises SessileError if the caller may not call at all."""
        ...

    @property
    def generation(self) -> int:
        """Changes when who was accepted before may not be any more."""
        ...


class HeaderTenant:
    """Believes the header ``x-sessile-tenant``: for trusted networks, or behind a proxy that sets
    it. Without the header the tenant is ``default``. Everybody may do everything."""

    generation = 0

    async def caller(self, metadata: Mapping[str, str]) -> Caller:
        return Caller(checked_tenant(metadata.get(TENANT_HEADER, DEFAULT_TENANT)), Role.OPERATOR)


class Bearer:
    """``authorization: Bearer …`` with an API key or a token; either has to be configured. Files
    are read again when they change. Raises OSError or ValueError for files that cannot be used."""

    def __init__(
        self,
        security: GatewaySecurity,
        *,
        check_interval_s: float = CHECK_INTERVAL_S,
        utc_now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._utc_now = utc_now
        self._keys: Reloaded[KeyRing] | None = None
        if (path := security.api_keys) is not None:
            self._keys = Reloaded(
                [path], lambda: KeyRing(load_keys(path)), check_interval_s=check_interval_s
            )
        self._tokens = (
            Tokens(security.jwt, check_interval_s=check_interval_s) if security.jwt else None
        )

    async def caller(self, metadata: Mapping[str, str]) -> Caller:
        scheme, credentials = _split(metadata.get(AUTHORIZATION, ""))
        if scheme != _SCHEME or not credentials:
            raise Unauthenticated("the call carries no credentials (authorization: Bearer …)")
        if self._keys is not None and (self._tokens is None or credentials.startswith(PREFIX)):
            key = self._keys.current().find(credentials, self._utc_now())
            if key is None:  # unknown, revoked, expired: whoever guesses is not told which
                raise Unauthenticated("the API key is not accepted")
            own, role, name = key.tenant, key.role, f"{PREFIX}{key.id}"
            expires_at = None if key.expires is None else key.expires.timestamp()
        elif self._tokens is not None:
            holder = self._tokens.holder(credentials)
            own, role, name = holder.tenant, holder.role, holder.name
            expires_at = holder.expires_at
        else:
            raise Unauthenticated("the API key is not accepted")
        tenant, foreign = acting_for(own, role, metadata.get(TENANT_HEADER))
        return Caller(tenant, role, name, foreign, expires_at)

    @property
    def generation(self) -> int:
        """How often keys and key sets were read again; looks whether they changed."""
        if self._keys is not None:
            self._keys.current()
        keys = self._keys.generation if self._keys is not None else 0
        return keys + (self._tokens.generation if self._tokens is not None else 0)


def authenticator_of(security: GatewaySecurity) -> Authenticator:
    """What the settings ask for. Raises OSError or ValueError for files that cannot be used."""
    return Bearer(security) if security.authenticates else HeaderTenant()


def _split(header: str) -> tuple[str, str]:
    scheme = header[: len(_SCHEME)].lower()
    return scheme, header[len(_SCHEME) :].strip()
