"""What tenants use, across all gateways and replicas: tokens in ledgers, and tokens for a minute.

A counter beside the sessions, in a slot of its own: replicas report sums of what they wrote, every
half second, and a count over the sessions themselves sets it right now and then (what was purged,
what a replica that died had not reported). So it is late by a moment, and never wrong for long.
"""

from __future__ import annotations

from statestore import keys, replies
from statestore.journal import RedisJournal
from statestore.records import TenantUsage
from statestore.script_runner import script_call

KEY_BYTES = 8


class RedisUsage(RedisJournal):
    """The part of SessionStore that is about usage."""

    async def read_usage(self, tenant: str, tokens_per_minute: int) -> TenantUsage:
        call = script_call("usage_read", [keys.usage_key(tenant)], [tokens_per_minute])
        (reply,) = await self._scripts.run(call)
        _, left, ledger = replies.items(reply)
        return TenantUsage(replies.number(left), replies.number(ledger))

    async def note_usage(self, tenant: str, age_ms: int = 0) -> None:
        call = script_call("usage_note", [keys.USAGE_TENANTS], [tenant, 1000 * age_ms])
        await self._scripts.run(call)

    async def uncounted_tenant(self, min_age_ms: int) -> str | None:
        call = script_call("usage_due", [keys.USAGE_TENANTS], [1000 * min_age_ms])
        (reply,) = await self._scripts.run(call)
        status, *tenant = replies.items(reply)
        return replies.text(tenant[0]) if status == b"due" else None

    async def count_ledgers(self, tenant: str, cursor: str, count: int) -> tuple[int, str]:
        """Raises StoreError if one of them cannot be read: half a count is none."""
        listed = await self._index_page(keys.tenant_index_key(tenant), cursor, count)
        ids = [session_id for session_id, _ in listed if keys.is_session_id(session_id)]
        calls = [script_call("ledger_size", [keys.session_key(i)], []) for i in ids]
        total = 0
        for reply in await self._scripts.run(*calls) if calls else ():
            total += replies.number(replies.items(reply)[1])
        return total, listed[-1][1] if len(listed) == count else ""

    async def settle_usage(self, tenant: str, told: int, counted: int) -> None:
        key = self._random_bytes(KEY_BYTES)
        await self._scripts.run(
            script_call("usage_settle", [keys.usage_key(tenant)], [told, counted, key])
        )

    async def _index_page(self, key: str, cursor: str, count: int) -> list[tuple[str, str]]:
        """(session id, cursor after it), newest first."""
        if cursor and not cursor.isdecimal():
            raise ValueError(f"{cursor!r} is no cursor of a session list")
        call = script_call("index_list", [key], [f"({cursor}" if cursor else "+inf", count])
        (reply,) = await self._scripts.run(call)
        flat = [replies.text(item) for item in replies.items(reply)]
        return list(zip(flat[::2], flat[1::2], strict=True))
