"""Runs scripts until they are answered: the only place that repeats a write.

A script that finds its own effect already there answers as if it had just been applied, so a call
whose answer was lost is simply sent again, unchanged.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from statestore.executor import Reply, ScriptCall, ScriptExecutor
from statestore.ports import StoreError, StoreUnavailable
from statestore.scripts import load_script


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds of the repeats of one operation."""

    attempt_timeout_s: float = 1.0
    total_timeout_s: float = 5.0
    """Then the caller gets StoreUnavailable."""
    first_delay_s: float = 0.01
    """Doubles with every repeat ..."""
    max_delay_s: float = 0.25
    """... up to this."""


def script_call(name: str, keys: Sequence[str], args: Sequence[bytes | str | int]) -> ScriptCall:
    """A call of ``lua/<name>.lua``."""
    return ScriptCall(load_script(name), tuple(keys), tuple(args))


class ScriptRunner:
    """Sends calls through an executor, with repeats timed by the injected clock."""

    def __init__(
        self,
        executor: ScriptExecutor,
        policy: RetryPolicy,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]],
    ) -> None:
        self._executor = executor
        self._policy = policy
        self._now = now
        self._sleep = sleep

    async def once(self, calls: Sequence[ScriptCall]) -> list[Reply | StoreError]:
        """One attempt; failures are among the results."""
        return await self._executor.execute(calls, self._policy.attempt_timeout_s)

    async def run(self, *calls: ScriptCall) -> list[Reply]:
        """One reply per call, in order. Raises what any of them failed with."""
        replies: list[Reply] = []
        for result in await self.run_each(*calls):
            if isinstance(result, StoreError):
                raise result
            replies.append(result)
        return replies

    async def run_each(self, *calls: ScriptCall) -> list[Reply | StoreError]:
        """The same with failures among the results. Repeats calls without an answer; raises
        StoreUnavailable when the time is up (any of the calls may have been applied)."""
        deadline = self._now() + self._policy.total_timeout_s
        delay = self._policy.first_delay_s
        replies: list[Reply | StoreError] = [None] * len(calls)
        pending = list(range(len(calls)))
        while True:
            timeout_s = min(self._policy.attempt_timeout_s, deadline - self._now())
            results = await self._executor.execute([calls[i] for i in pending], timeout_s)
            failed: list[int] = []
            failure: StoreUnavailable | None = None
            for i, result in zip(pending, results, strict=True):
                if isinstance(result, StoreUnavailable):
                    failed.append(i)
                    failure = result
                else:
                    replies[i] = result
            if failure is None:
                return replies
            if self._now() + delay >= deadline:
                raise failure
            await self._sleep(delay)
            if self._now() >= deadline:  # slept longer than asked: the process had been stopped
                raise failure
            delay = min(2 * delay, self._policy.max_delay_s)
            pending = failed

    async def aclose(self) -> None:
        await self._executor.aclose()
