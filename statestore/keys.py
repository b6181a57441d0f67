"""Names of keys. A session's id embeds its family, so an id alone finds its hash slot.

    ses_<family>             root of a family of forks
    ses_<family>.<suffix>    a fork, however deep

All keys of a family carry the hash tag ``{<family>}`` and are in one slot: a script may touch
several of them. Indices are outside the family slots; they are eventually consistent.
"""

from __future__ import annotations

import re

from statestore.records import ReplicaRef

_SESSION_ID = re.compile(r"ses_([A-Za-z0-9_-]{1,64})(?:\.[A-Za-z0-9_.-]{1,64})?")

DUE = "sessile:due"
"""Sorted set of sessions by the store's time in ms at which they have to be swept."""

FLEET = "sessile:fleet"

USAGE_TENANTS = "sessile:usage-tenants"
"""Sorted set of tenants by the store's time in microseconds at which their last count began."""


def family_of(session_id: str) -> str:
    """The family of a session; ValueError if this is no session id."""
    match = _SESSION_ID.fullmatch(session_id)
    if match is None:
        raise ValueError(f"{session_id!r} is not a session id (ses_<family>[.<suffix>])")
    return match[1]


def is_session_id(text: str) -> bool:
    """Whether keys can be named after it."""
    return _SESSION_ID.fullmatch(text) is not None


def session_key(session_id: str) -> str:
    """Hash with everything about a session but its tokens."""
    return f"sessile:{{{family_of(session_id)}}}:s:{session_id}"


def ledger_key(ledger_id: str) -> str:
    """String of packed tokens; a ledger is named by the session that writes it."""
    return f"sessile:{{{family_of(ledger_id)}}}:l:{ledger_id}"


def refs_key(session_id: str) -> str:
    """Hash of the family: how many sessions refer to each session's tokens and turns (itself
    included), and how far; which were purged a short while ago."""
    return f"sessile:{{{family_of(session_id)}}}:refs"


def tenant_index_key(tenant: str) -> str:
    """Sorted set of a tenant's sessions by time of creation."""
    return f"sessile:tenant-sessions:{tenant}"


def replica_index_key(ref: ReplicaRef) -> str:
    """Sorted set of the sessions that a replica process owns, by time of placement."""
    return f"sessile:replica-sessions:{ref}"


def salt_key(tenant: str) -> str:
    """String: the tenant's salt."""
    return f"sessile:tenant-salt:{tenant}"


def usage_key(tenant: str) -> str:
    """Hash: what a tenant has used, as far as replicas have reported it."""
    return f"sessile:usage:{tenant}"


def lease_key(name: str) -> str:
    """Hash of a lease."""
    return f"sessile:lease:{name}"


def fence_key(tag: str) -> str:
    """String without content, written before WAIT; ``tag`` decides its hash slot."""
    return f"sessile:fence:{{{tag}}}"


def hash_tag(key: str) -> str:
    """What decides a key's hash slot."""
    return key[key.index("{") + 1 : key.index("}")] if "{" in key else key
