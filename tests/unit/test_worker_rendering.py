"""Long inputs are rendered beside the event loop."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import anyio
import pytest

from tests.support.codecs import load_tiny_codec
from tests.support.replica_world import in_virtual_time, listen, world
from workers.text.bytes_codec import BytesCodec
from workers.text.port import ChatMessage, LastTurn, Role, Tool
from workers.turn.ports import TurnPorts


class SlowCodec(BytesCodec):
    """Remembers the threads in which it renders."""

    quick_chars = 10

    def __init__(self) -> None:
        self.threads: list[int] = []

    def render(
        self, last_turn: LastTurn, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> list[int]:
        self.threads.append(threading.get_ident())
        return super().render(last_turn, messages, tools)


def ports(codec: SlowCodec) -> TurnPorts:
    return TurnPorts(*[None] * 4, codec, *[None] * 6)  # type: ignore[arg-type,call-arg]


@pytest.mark.parametrize(
    ("messages", "tools", "on_loop"),
    [
        ([ChatMessage(Role.USER, "short")], [], True),
        ([ChatMessage(Role.USER, "not so short any more")], [], False),
        ([ChatMessage(Role.USER, "short")], [Tool("f", "", '{"type": "object"}')], False),
    ],
)
def test_only_what_is_quick_is_rendered_on_the_event_loop(
    messages: list[ChatMessage], tools: list[Tool], on_loop: bool
) -> None:
    codec = SlowCodec()

    async def main() -> list[int]:
        return await ports(codec).render(LastTurn.NONE, messages, tools)

    assert anyio.run(main) == BytesCodec().render(LastTurn.NONE, messages, tools)
    assert (codec.threads == [threading.get_ident()]) is on_loop


@in_virtual_time
async def test_the_simulation_stays_on_its_loop() -> None:
    async with world() as w:
        replica = await w.start_owner()
        threads = threading.active_count()
        await listen(replica, await w.request(replica, "x" * 1000))
        assert threading.active_count() == threads


def test_a_model_is_read_in_threads_as_on_the_loop() -> None:
    codec = load_tiny_codec("qwen25")
    messages = [ChatMessage(Role.USER, f"{n} Grüße 世界\n" * 200) for n in range(8)]
    alone = [codec.render(LastTurn.NONE, [it], []) for it in messages]
    found: list[list[int]] = [[]] * len(messages)

    async def main() -> None:
        async def render(index: int) -> None:
            found[index] = await anyio.to_thread.run_sync(
                codec.render, LastTurn.NONE, [messages[index]], []
            )

        async with anyio.create_task_group() as tasks:
            for index in range(len(messages)):
                tasks.start_soon(render, index)

    anyio.run(main)
    assert found == alone
