"""What the simulation makes of KV that broke on its way: refused, or used though it must not be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from loadtest.simulation.checkers.imports import WatchedImport
from loadtest.simulation.loop import run
from workers.engines.port import PageMeta
from workers.kv.pages import IncomingPages

PAGES = [PageMeta(bytes([index]), index) for index in range(4)]


class Accepting:
    """An import that takes its first ``taken`` pages, whatever is in them."""

    def __init__(self, taken: int) -> None:
        self._taken = taken

    async def commit(self, pages: Sequence[PageMeta]) -> int:
        return min(self._taken, len(pages))

    def release(self) -> None:
        pass


@pytest.mark.parametrize(
    ("wrong", "broken", "taken", "refused", "complaints"),
    [
        ((), False, 4, 0, 0),
        ((2, 3), False, 2, 1, 0),
        ((3, 2), False, 3, 0, 1),
        ((), True, None, 1, 0),
        ((), True, 1, 0, 1),
    ],
)
def test_an_import_that_was_spoilt_is_refused_or_complained_of(
    wrong: Sequence[int], broken: bool, taken: int | None, refused: int, complaints: int
) -> None:
    refusals: list[bool] = []
    told: list[str] = []
    inner = cast(IncomingPages, Accepting(taken or 0))
    watched = WatchedImport(inner, lambda: refusals.append(True), told.append)
    for index in wrong:
        watched.arrived_wrong(index)
    watched.broken = broken

    async def end() -> None:
        if taken is not None:
            await watched.commit(PAGES)
        watched.release()
        watched.release()

    run(end)
    assert (len(refusals), len(told)) == (refused, complaints)
