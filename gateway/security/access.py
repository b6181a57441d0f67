"""Who may call what: two roles, and one entry for every RPC that a gateway serves.

An RPC without an entry is refused to everybody, so that a new one is not open by oversight.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.core.errors import InvalidRequest, PermissionDenied

TENANT_HEADER = "x-sessile-tenant"
DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Role(enum.StrEnum):
    """What a caller may do."""

    AGENT = "agent"
    """Everything with its own tenant's sessions."""
    OPERATOR = "operator"
    """The fleet, and as an agent of any tenant that it names in the header."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, after authentication."""

    tenant: str
    """The one that the call is for."""
    role: Role
    name: str = ""
    """For logs: a key's id, a token's subject. No secret."""
    foreign: bool = False
    """An operator acts for a tenant that is not its own."""
    expires_at: float | None = field(default=None, compare=False)
    """Unix seconds at which the credentials end; None: not by themselves."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call an RPC, and whether operators' calls of it are written to the audit log."""

    role: Role
    """At least this one."""
    audited: bool = False


AGENTS = Access(Role.AGENT)
OPERATORS = Access(Role.OPERATOR)
OPERATORS_AUDITED = Access(Role.OPERATOR, audited=True)

RPCS: Mapping[str, Access] = {
    "sessile.v1.SessionService.OpenSession": AGENTS,
    "sessile.v1.SessionService.GetSession": AGENTS,
    "sessile.v1.SessionService.ListSessions": AGENTS,
    "sessile.v1.SessionService.RunTurn": AGENTS,
    "sessile.v1.SessionService.CancelTurn": AGENTS,
    "sessile.v1.SessionService.ForkSession": AGENTS,
    "sessile.v1.SessionService.SuspendSession": AGENTS,
    "sessile.v1.SessionService.ResumeSession": AGENTS,
    "sessile.v1.SessionService.CloseSession": AGENTS,
    "sessile.v1.SessionService.GetTranscript": AGENTS,
    "sessile.v1.SessionService.WatchSession": AGENTS,
    "sessile.v1.FleetService.ListReplicas": OPERATORS,
    "sessile.v1.FleetService.WatchFleet": OPERATORS,
    "sessile.v1.FleetService.DrainReplica": OPERATORS_AUDITED,
    "sessile.v1.FleetService.MigrateSession": OPERATORS_AUDITED,
}
"""By the RPC's full name."""


def permit(caller: Caller, rpc: str) -> Access:
    """What holds for a call that may be made. Raises PermissionDenied."""
    access = RPCS.get(rpc)
    if access is None:
        raise PermissionDenied("nobody may call this: it has no entry in the table of RPCs")
    if access.role is Role.OPERATOR and caller.role is not Role.OPERATOR:
        raise PermissionDenied(f"{rpc.rpartition('.')[2]} is not for the role {caller.role}")
    return access


def acting_for(own: str, role: Role, named: str | None) -> tuple[str, bool]:
    """The tenant of a call, and whether it is another than the caller's: operators may name any
    in the header, agents their own only. Raises InvalidRequest, PermissionDenied."""
    if named is None or named == own:
        return own, False
    if role is not Role.OPERATOR:
        raise PermissionDenied(
            f"{TENANT_HEADER} names another tenant than the credentials are for",
            hint="Leave the tenant out: it is that of the key or token.",
        )
    return checked_tenant(named), True


def checked_tenant(tenant: str) -> str:
    """Raises InvalidRequest for a name that no tenant can have."""
    if _TENANT.fullmatch(tenant) is None:
        raise InvalidRequest(
            f"{TENANT_HEADER} has 1 to 64 characters out of letters, digits, '_', '.' and '-'"
        )
    return tenant
