"""A turn's side of the engine: its generation, started, parked, taken back.

The engine may run ahead of the journal by a bounded number of steps. Over it this generation alone
is parked; the batch goes on without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from gateway.telemetry.propagation import headers
from workers.engines.port import EngineOverloaded, GenerateRequest, StepOutput
from workers.turn.opening import Opened
from workers.turn.ports import TurnPorts


@dataclass(frozen=True, slots=True)
class FirstOutput:
    """How a generation came to its first token; times are the event loop's."""

    submitted_at: float
    came_at: float
    queue_s: float | None
    """Of that time, in the engine's queue; None: the engine does not tell."""
    cached_tokens: int
    context_tokens: int


class Generation:
    """Feeds one opened turn's output. ``wake`` is called whenever there is something to do for the
    turn's task. Times are the event loop's."""

    def __init__(self, ports: TurnPorts, opened: Opened, wake: Callable[[], None]) -> None:
        self.cached_tokens = 0
        """Prefix tokens this attempt found in the KV cache; an estimate before its first step."""
        self.unacked_steps = 0
        """Steps delivered that no acknowledged append covers yet."""
        self.failure = ""
        """Why the engine cannot go on with this turn; it will never deliver again then."""
        self._ports = ports
        self._opened = opened
        self._wake = wake
        self._id = ""
        self._starts = 0
        self._parked = False
        self._not_before = -math.inf
        self._active_since = math.inf
        self._submitted_at, self._submitted_tokens = 0.0, 0
        self._first: FirstOutput | None = None

    def measure(self) -> None:
        """Takes the estimate: what of the prefix is in the cache now. An engine computes at least
        the last token."""
        engine, resident = self._ports.engine, self._opened.resident
        pages = engine.reusable_pages(resident.block_hashes(engine.info))
        self.cached_tokens = min(pages * engine.info.page_size, len(resident.tokens) - 1)

    def start(self, now: float) -> None:
        """Submits the context as far as the ledger goes, unless that was done or the engine was
        full just now. A full engine is asked again later: an accepted turn is never dropped."""
        if self._id or now < self._not_before:
            return
        self._starts += 1
        opened = self._opened
        turn, plan, done = opened.turn, opened.plan, len(opened.output.tokens)
        session_id, turn_id = opened.resident.session_id, turn.spec.turn_id
        generation_id = f"{session_id}/{turn_id}/{turn.attempt}/{self._starts}"
        request = GenerateRequest(
            generation_id=generation_id,
            tokens=opened.resident.tokens[:],
            namespace=opened.resident.salt,
            sampling=plan.sampling,
            max_new_tokens=plan.rules.max_tokens - done,
            min_new_tokens=max(0, plan.rules.min_tokens - done),
            stop_token_ids=plan.rules.stop_token_ids,
            priority=plan.priority,
            retention_id=session_id,
            trace=headers(),
        )
        self._ports.dispatcher.expect(generation_id, self._deliver)
        try:
            self._ports.engine.submit(request)
        except EngineOverloaded as error:
            self._ports.dispatcher.forget(generation_id)
            self._not_before = now + max(error.retry_after_ms, 1) / 1000
        except ValueError as error:
            self._ports.dispatcher.forget(generation_id)
            self.failure = f"the engine refused the turn: {error}"
            self._wake()
        else:
            self._id, self._active_since = generation_id, now
            self._submitted_at, self._submitted_tokens = now, len(request.tokens)

    def take_first(self) -> FirstOutput | None:
        """How the last start came to its first token, once."""
        first, self._first = self._first, None
        return first

    def retract(self) -> None:
        """Takes the generation back; nothing more is delivered for it. What it computed stays in
        the cache, so that :meth:`start` later costs one partial page."""
        if self._id:
            self._ports.engine.cancel(self._id)
            self._ports.dispatcher.forget(self._id)
        self._id, self._parked = "", False

    def acknowledge(self, steps: int, now: float) -> None:
        """The journal has caught up by ``steps``."""
        self.unacked_steps -= steps
        if self._parked and self.unacked_steps < self._ports.limits.max_unacked_steps:
            self._ports.engine.unpark(self._id)
            self._parked, self._active_since = False, now

    @property
    def due_at(self) -> float:
        """When to look again: at a new try to submit, or when the engine would count as hung.
        Waiting for the store (parked) is not lack of progress (P9)."""
        if not self._id:
            return self._not_before
        if self._parked:
            return math.inf
        seen = max(self._active_since, self._ports.dispatcher.last_step_at)
        return seen + self._ports.limits.progress_timeout_s

    def hung(self, now: float) -> bool:
        """The engine has work and makes no step for anybody."""
        return bool(self._id) and now >= self.due_at

    def _deliver(self, step: StepOutput) -> None:
        """On the event loop, from the engine's step."""
        output = self._opened.output
        if step.cached_tokens is not None:
            self.cached_tokens = step.cached_tokens
            self._first = FirstOutput(
                self._submitted_at,
                anyio.current_time(),
                step.queue_s,
                step.cached_tokens,
                self._submitted_tokens,
            )
        output.push(step.tokens)
        self.unacked_steps += 1
        if step.error is not None:
            self.failure = step.error
        elif step.finish is not None and output.reason is None:
            self.failure = f"the engine ended early ({step.finish})"
        if self.failure or output.reason is not None:
            self.retract()
        elif self.unacked_steps >= self._ports.limits.max_unacked_steps and not self._parked:
            self._ports.engine.park(self._id)
            self._parked = True
        self._wake()
