"""How many sessions a tenant may have."""

from __future__ import annotations

import pytest

from statestore.ports import LimitReached
from tests.support.owners import TENANT, new_session, opened
from tests.support.stores import Backend, store_on

pytestmark = pytest.mark.anyio


async def test_a_tenant_has_a_bounded_number_of_sessions(backend: Backend) -> None:
    store = store_on(backend)
    first = await opened(store, "ses_a")
    assert await store.find_or_admit(TENANT, "ses_b", 2) is None
    await store.fork("ses_a", "ses_a.f", None, ())
    assert await store.find_or_admit(TENANT, "ses_b", 2) == LimitReached("sessions")
    assert await store.find_or_admit(TENANT, "ses_a", 2) == first
    await store.open_session(new_session("ses_x", tenant="other"))
    assert await store.find_or_admit("other", "ses_y", 2) is None
    await store.close("ses_a.f", 60_000)
    assert await store.find_or_admit(TENANT, "ses_b", 2) == LimitReached("sessions")
    await store.close("ses_a.f", 0)
    assert await store.find_or_admit(TENANT, "ses_b", 2) is None


async def test_without_a_bound_a_tenant_has_any_number_of_sessions(backend: Backend) -> None:
    store = store_on(backend)
    await opened(store, "ses_a")
    assert await store.find_or_admit(TENANT, "ses_b", 0) is None
