"""Routes an engine's step outputs to the turns they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio

from workers.engines.port import StepOutput

Deliver = Callable[[StepOutput], None]


class Dispatcher:
    """Pass :meth:`on_step` to ``Engine.start``. Receivers must not wait or raise."""

    def __init__(self) -> None:
        self._receivers: dict[str, Deliver] = {}
        self.last_step_at = 0.0
        """When the engine last delivered anything, in the event loop's clock."""
        self.steps = 0

    def expect(self, generation_id: str, deliver: Deliver) -> None:
        self._receivers[generation_id] = deliver

    def forget(self, generation_id: str) -> None:
        self._receivers.pop(generation_id, None)

    def on_step(self, outputs: Sequence[StepOutput]) -> None:
        self.last_step_at = anyio.current_time()
        self.steps += 1
        for output in outputs:
            # A generation that was cancelled between step and delivery has no receiver any more.
            deliver = self._receivers.get(output.generation_id)
            if deliver is not None:
                deliver(output)
