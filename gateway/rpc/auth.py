"""Who calls: a port, so that keys or JWTs can take the place of the plain header."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from gateway.core.errors import InvalidRequest

TENANT_HEADER = "x-sessile-tenant"
DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Authenticator(Protocol):
    """Maps a call's metadata to a tenant."""

    async def tenant(self, metadata: Mapping[str, str]) -> str:
        """Raises SessileError if the caller may not call at all."""
        ...


class HeaderTenant:
    """Believes the header ``x-sessile-tenant``: for trusted networks, or behind a proxy that sets
    it. Without the header the tenant is ``default``."""

    async def tenant(self, metadata: Mapping[str, str]) -> str:
        tenant = metadata.get(TENANT_HEADER, DEFAULT_TENANT)
        if _TENANT.fullmatch(tenant) is None:
            raise InvalidRequest(
                f"{TENANT_HEADER} has 1 to 64 characters out of letters, digits, '_', '.' and '-'"
            )
        return tenant
