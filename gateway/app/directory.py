"""Which sessions a tenant may touch, and who owns them.

Every access goes through here, so that another tenant's session looks exactly like one that does
not exist. Owners are cached: a stale entry costs one NOT_OWNER answer, never correctness.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b32encode
from collections import OrderedDict
from dataclasses import dataclass, replace

from gateway.config import GatewayConfig
from gateway.core.errors import NotFound
from gateway.core.placement import BYTES_PER_TOKEN, Holder, PlacementRequest
from statestore.ports import SessionStore
from statestore.records import Owner, Session

_SESSION_ID = re.compile(r"ses_[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64})?")
_FAMILY_BYTES = 15
_SUFFIX_BYTES = 10


@dataclass(frozen=True, slots=True)
class KnownSession:
    """What is remembered of a session. Its tenant never changes; all else may be stale."""

    session_id: str
    tenant: str
    owner: Owner | None
    request: PlacementRequest | None
    """What placement needs to know of it, without the turn to come. None for a fork, whose parent
    counts too."""


class SessionDirectory:
    """Reads sessions on behalf of tenants; a bounded cache of owners and of tenants' salts."""

    def __init__(self, store: SessionStore, config: GatewayConfig) -> None:
        self._store = store
        self._tables = config.tables
        self._known: OrderedDict[str, KnownSession] = OrderedDict()
        self._salts: OrderedDict[str, bytes] = OrderedDict()

    async def find(self, tenant: str, session_id: str) -> KnownSession:
        """From the cache if it is there. Raises NotFound (foreign ones too), StoreError."""
        known = self._known.get(session_id)
        if known is None or known.tenant != tenant:
            # Also for a foreign one: it must take as long as one that does not exist (I10).
            await self.read(tenant, session_id)
            known = self._known[session_id]
        self._known.move_to_end(session_id)
        return known

    async def read(self, tenant: str, session_id: str) -> Session:
        """The record as stored now. Raises NotFound (also for foreign sessions), StoreError."""
        if _SESSION_ID.fullmatch(session_id) is None:
            raise unknown_session(session_id)
        session = await self._store.get_session(session_id)
        if session is None:
            self._known.pop(session_id, None)
            raise unknown_session(session_id)
        if session.tenant != tenant:
            raise unknown_session(session_id)
        self.remember(session)
        return session

    def remember(self, session: Session) -> KnownSession:
        known = KnownSession(
            session.session_id,
            session.tenant,
            session.owner,
            placement_request(session) if session.parent_id is None else None,
        )
        self._known[session.session_id] = known
        self._known.move_to_end(session.session_id)
        while len(self._known) > self._tables.owners:
            self._known.popitem(last=False)
        return known

    def forget_owner(self, session_id: str, owner: Owner | None) -> None:
        """The cached owner, if it is still this one, was found stale."""
        known = self._known.get(session_id)
        if known is not None and known.owner == owner:
            self._known[session_id] = replace(known, owner=None)

    async def salt(self, tenant: str) -> bytes:
        """The tenant's secret: keys everything that must not be comparable between tenants."""
        salt = self._salts.get(tenant)
        if salt is None:
            salt = await self._store.tenant_salt(tenant)
            self._salts[tenant] = salt
        self._salts.move_to_end(tenant)
        while len(self._salts) > self._tables.salts:
            self._salts.popitem(last=False)
        return salt

    async def new_session_id(self, tenant: str, request_id: str) -> str:
        """Id of the root session that this request opens: a retry meets its own record."""
        salt = await self.salt(tenant)
        return "ses_" + _name(salt, b"open", _FAMILY_BYTES, tenant, request_id)

    async def new_fork_id(self, tenant: str, parent_id: str, request_id: str) -> str:
        """Id of the fork that this request makes, in its parent's family."""
        salt = await self.salt(tenant)
        family = parent_id.partition(".")[0]
        return f"{family}." + _name(salt, b"fork", _SUFFIX_BYTES, tenant, parent_id, request_id)


def placement_request(session: Session) -> PlacementRequest:
    """What placement needs to know of a stored session, without the turn to come."""
    before = (session.previous_owner, session.owner.replica if session.owner else None)
    length = session.head.length
    return PlacementRequest(
        session_id=session.session_id,
        model=session.model,
        history_tokens=length,
        leading_digest=session.leading_digest.hex(),
        leading_tokens=len(session.preamble) // BYTES_PER_TOKEN,
        token_fingerprint=session.token_fingerprint.hex(),
        holders=tuple(Holder(ref, length) for ref in before if ref is not None),
    )


def unknown_session(session_id: str) -> NotFound:
    """The same for sessions that do not exist and for those of other tenants."""
    shown = session_id[:128]
    return NotFound(
        f"no session {shown!r}", reason="SESSION_NOT_FOUND", metadata={"session_id": shown}
    )


def _name(salt: bytes, kind: bytes, size: int, *parts: str) -> str:
    text = "\0".join(parts).encode()
    digest = hashlib.blake2b(text, digest_size=size, key=salt, person=kind).digest()
    return b32encode(digest).decode().lower()
