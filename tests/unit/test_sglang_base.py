"""For how long sglang is to keep what a session's requests left in its cache."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from tests.unit.test_sglang_requests import INFO
from workers.engines.port import GenerateRequest, Sampling
from workers.engines.sglang_requests import base as base_module
from workers.engines.sglang_requests.base import RequestEngine
from workers.engines.sglang_requests.generations import Generations, Request

pytestmark = pytest.mark.anyio


class FakeEngine(RequestEngine):
    """Its sglang answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[str] = []
        self._generations = Generations(self, INFO, lambda namespace, tokens: self)
        self._generations.on_step = lambda outputs: None

    def generate(self, request: Request) -> None:
        pass

    def abort(self, rid: str) -> None:
        pass

    def extend(self, tokens: Sequence[int]) -> None:
        pass

    def _close_session(self, session_id: str) -> None:
        self.closed.append(session_id)

    def turn(self, session_id: str) -> None:
        """A turn whose session is pinned by nobody afterwards."""
        generation_id = f"of {session_id}"
        request = GenerateRequest(
            generation_id=generation_id,
            tokens=[5],
            namespace=b"n",
            sampling=Sampling(),
            max_new_tokens=1,
            retention_id=session_id,
        )
        self.submit(request)
        self.cancel(generation_id)

    def pin(self, session_id: str, ttl_s: float) -> None:
        self._tag(session_id, ttl_s)

    def unpin(self, session_id: str) -> None:
        self._untag(session_id)

    async def until_closed(self, *session_ids: str) -> None:
        with anyio.move_on_after(10):
            while len(self.closed) < len(session_ids):
                await anyio.lowlevel.checkpoint()
        assert self.closed == [*session_ids]


@pytest.fixture
async def it() -> FakeEngine:
    return FakeEngine()


async def test_a_session_is_closed_when_its_pin_ends(it: FakeEngine) -> None:
    it.pin("a", 60.0)
    it.pin("b", 0.0)
    await it.until_closed("b")
    it.unpin("a")
    assert it.closed == ["b", "a"]


async def test_a_turn_whose_session_is_never_pinned_does_not_leave_it_open(
    it: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "TAG_TTL_S", 0.0)
    it.turn("a")
    await it.until_closed("a")


async def test_a_turn_does_not_shorten_a_pin(
    it: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "TAG_TTL_S", 0.0)
    it.pin("a", 60.0)
    it.turn("a")
    it.turn("b")
    await it.until_closed("b")


async def test_what_was_closed_is_closed_again_on_demand(it: FakeEngine) -> None:
    """A request that came meanwhile has opened it again."""
    it.unpin("a")
    assert it.closed == ["a"]


async def test_over_the_bound_the_oldest_is_closed(
    it: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "MAX_TAGGED", 2)
    for session_id in ("a", "b", "a", "c"):
        it.pin(session_id, 60.0)
    assert it.closed == ["b"]


async def test_after_the_end_no_session_is_closed(it: FakeEngine) -> None:
    it.pin("a", 0.0)
    it._end()
    await anyio.wait_all_tasks_blocked()
    assert it.closed == []
