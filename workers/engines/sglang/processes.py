"""The processes that sglang starts, and how their end is noticed.

sglang's schedulers catch what goes wrong in them, ask their parent by SIGQUIT to end everything,
and end with 0, which sglang's own watchdog takes for a proper end. A hung one asks and stays. So
the request is a failure whatever the processes do, and so is every end that nobody asked for.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

REAP_S = 1.0
"""For the exit code of a process that has ended."""
ASKED = (
    "sglang asks to be ended: one of its processes failed or hangs, as its log tells; restart the "
    "replica"
)


class Processes:
    """Those that this process starts through multiprocessing from now on, until :meth:`watch`."""

    def __init__(self) -> None:
        self._before = set(multiprocessing.active_children())
        self._mine: frozenset[BaseProcess] | None = None
        """None: what is started still counts."""
        self._watched: list[BaseProcess] = []

    def started(self) -> list[BaseProcess]:
        """Those that live."""
        alive = multiprocessing.active_children()
        if self._mine is None:
            return [child for child in alive if child not in self._before]
        return [child for child in alive if child in self._mine]

    def watch(self, on_end: Callable[[str], None]) -> None:
        """Calls ``on_end`` once, on the running loop, when one of those that live now has ended,
        with whatever exit code."""
        loop = asyncio.get_running_loop()

        def ended(child: BaseProcess) -> None:
            self.unwatch()
            child.join(REAP_S)
            on_end(f"a process of sglang ended with {child.exitcode}; restart the replica")

        self._watched = self.started()
        self._mine = frozenset(self._watched)
        for child in self._watched:
            loop.add_reader(child.sentinel, ended, child)

    def unwatch(self) -> None:
        """On the loop of :meth:`watch`; from now on they may end."""
        watched, self._watched = self._watched, []
        for child in watched:
            asyncio.get_running_loop().remove_reader(child.sentinel)

    def end(self, timeout_s: float, *, asked: bool) -> None:
        """Blocks until none lives. ``asked``: some of them end by themselves. What has not ended by
        then is killed."""
        children = self.started()
        deadline = time.monotonic() + timeout_s
        for stop in (None, "terminate", "kill") if asked else ("terminate", "kill"):
            for child in children:
                if stop is not None and child.is_alive():
                    getattr(child, stop)()
            for child in children:
                left = max(0.1, deadline - time.monotonic())
                child.join(left / 3 if stop != "kill" else None)
