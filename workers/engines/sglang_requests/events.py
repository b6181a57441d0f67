"""Which pages sglang's own tiers hold, from the KV events that its scheduler publishes.

Events are numbered. What was missed is asked for again from the publisher's buffer; what that no
longer has, another publisher and a batch that cannot be read make the whole view unknown, and it is
begun anew: a view may lack pages that are there, but never has pages that are not.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec
import zmq
import zmq.asyncio

from statestore.digest import pack_tokens
from workers.engines.sglang_requests.generations import namespace_of
from workers.kv.blocks import next_hash, root_hash

log = logging.getLogger(__name__)

TOPIC = "kv"
REPLAY_TIMEOUT_MS = 5000
"""For the next of the batches asked for: the publisher answers between those that it publishes."""
MAX_WAITING = 10_000
"""Batches that wait to be read, as many as sglang keeps to be asked for again. Over it those that
follow are lost, which their numbers tell."""
MAX_REPLAYED = 1 << 16
"""Batches taken of one answer; those after them are lost."""
RECONNECT_S = 0.1
MAX_BLOCKS = 1 << 20
"""Of the view; over it, it is begun anew."""


async def follow_events(address: str, replay: str) -> AsyncGenerator[bytes | None]:
    """The batches of events that are published at ``address``, for ever (see :func:`in_order`).
    ``replay`` is where the publisher answers for earlier ones; empty: nowhere."""

    async def missed(first: int) -> list[tuple[int, bytes]]:
        return await _earlier(replay, first) if replay else []

    async with (
        aclosing(_published(address)) as published,
        aclosing(in_order(published, missed)) as batches,
    ):
        async for batch in batches:
            yield batch


async def in_order(
    published: AsyncIterator[tuple[int, bytes] | None],
    missed: Callable[[int], Awaitable[list[tuple[int, bytes]]]],
) -> AsyncGenerator[bytes | None]:
    """Numbered batches from number 0 on, each once; None where some were lost, or where another
    publisher begins. ``published`` has None where its connection was lost; ``missed`` returns the
    batches from a number on that the publisher still has."""
    expected = 0
    async for heard in published:
        if heard is None:
            log.warning("the connection to the KV events was lost")
            yield None
            expected = 0
            continue
        number, payload = heard
        if number < expected:
            # A publisher counts up, and what is sent again is taken only up to what was heard.
            log.warning("KV event %d after %d: another publisher", number, expected - 1)
            yield None
            expected = 0
        if number > expected:
            for earlier, batch in await missed(expected):
                if expected < earlier < number:
                    _tell_lost(expected, earlier)
                    yield None
                    expected = earlier
                if earlier == expected < number:
                    yield batch
                    expected += 1
        if number > expected:
            _tell_lost(expected, number)
            yield None
        yield payload
        expected = number + 1


def _tell_lost(first: int, next_: int) -> None:
    log.warning("KV events %d to %d were lost", first, next_ - 1)


async def _published(address: str) -> AsyncGenerator[tuple[int, bytes] | None]:
    """None after a lost connection: whoever publishes from now on may be another."""
    context: zmq.asyncio.Context = zmq.asyncio.Context.instance()
    while True:
        socket: Any = context.socket(zmq.SUB)
        with socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, MAX_WAITING)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            lost = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            poller: Any = zmq.asyncio.Poller()
            for either in (socket, lost):
                poller.register(either, zmq.POLLIN)
            try:
                socket.connect(address)
                while lost not in dict(await poller.poll()):
                    _, number, payload = await socket.recv_multipart()
                    yield int.from_bytes(number, "big"), payload
            finally:
                socket.disable_monitor()
                lost.close()
        yield None
        await anyio.sleep(RECONNECT_S)


async def _earlier(address: str, first: int) -> list[tuple[int, bytes]]:
    context: zmq.asyncio.Context = zmq.asyncio.Context.instance()
    socket: Any = context.socket(zmq.DEALER)
    with socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, MAX_WAITING)
        socket.connect(address)
        # As a REQ would ask, which takes only one answer.
        await socket.send_multipart([b"", first.to_bytes(8, "big")])
        found: list[tuple[int, bytes]] = []
        while len(found) < MAX_REPLAYED:
            if not await socket.poll(REPLAY_TIMEOUT_MS):
                log.warning("%s does not answer for KV events from %d on", address, first)
                break
            _, number, payload = (await socket.recv_multipart())[-3:]
            if int.from_bytes(number, "big", signed=True) < 0:
                break
            found.append((int.from_bytes(number, "big"), payload))
        return found


@dataclass(slots=True)
class _Block:
    name: bytes
    media: set[str] = field(default_factory=set)


class ResidentView:
    """Not thread-safe: fed and asked on one thread."""

    def __init__(self, kv_fingerprint: bytes, page_size: int) -> None:
        self.resyncs = 0
        """How often the view was begun anew."""
        self._kv_fingerprint = kv_fingerprint
        self._page_size = page_size
        self._blocks: dict[int, _Block] = {}
        """sglang's hash -> block."""
        self._resident: dict[bytes, int] = {}
        """Our name -> how many of sglang's tiers hold it."""

    def __len__(self) -> int:
        return len(self._resident)

    def run(self, block_hashes: Sequence[bytes]) -> int:
        """Longest run of these blocks, from the first, that sglang holds."""
        for count, name in enumerate(block_hashes):
            if name not in self._resident:
                return count
        return len(block_hashes)

    def take(self, batch: bytes | None) -> None:
        """The next batch of events; None: some were lost, and the view begins anew, as it does
        after a batch that cannot be read."""
        if batch is None:
            self.reset()
            return
        try:
            self._take(batch)
        except Exception:
            log.warning("KV events that cannot be read: the view begins anew", exc_info=True)
            self.reset()

    def _take(self, batch: bytes) -> None:
        for event in msgspec.msgpack.decode(batch)[1]:
            kind = event["type"]
            if kind == "BlockStored":
                self._stored(event)
            elif kind == "BlockRemoved":
                for hash_ in event["block_hashes"]:
                    self._removed(hash_, event.get("medium") or "")
            elif kind == "AllBlocksCleared":
                self._clear()
        if len(self._blocks) > MAX_BLOCKS:
            log.warning("more than %d KV blocks are known: the view begins anew", MAX_BLOCKS)
            self.reset()

    def reset(self) -> None:
        """Nothing is known any more."""
        self.resyncs += 1
        self._clear()

    def forget(self, block_hashes: Sequence[bytes]) -> None:
        """sglang may still hold these, and nobody is to count on it."""
        for name in block_hashes:
            self._resident.pop(name, None)

    def _clear(self) -> None:
        self._blocks.clear()
        self._resident.clear()

    def _stored(self, event: dict[str, Any]) -> None:
        tokens, size = event["token_ids"], self._page_size
        parent = event.get("parent_block_hash")
        salt = event.get("cache_salt")
        if event["block_size"] != size or salt is None:
            return  # nobody of ours asked for it
        if parent is None:
            namespace = namespace_of(salt)
            if namespace is None:
                return  # nor for this
            previous = root_hash(self._kv_fingerprint, namespace)
        elif parent in self._blocks:
            previous = self._blocks[parent].name
        else:
            return  # stored before the view began
        medium = event.get("medium") or ""
        for index, hash_ in enumerate(event["block_hashes"]):
            page = tokens[size * index : size * (index + 1)]
            if len(page) != size or not all(type(token) is int for token in page):
                return  # of speculative decoding, which caches pairs of tokens: not what we name
            previous = next_hash(previous, pack_tokens(page))
            block = self._blocks.setdefault(hash_, _Block(previous))
            if medium not in block.media:
                block.media.add(medium)
                self._resident[block.name] = self._resident.get(block.name, 0) + 1

    def _removed(self, hash_: int, medium: str) -> None:
        block = self._blocks.get(hash_)
        if block is None or medium not in block.media:
            return
        block.media.remove(medium)
        left = self._resident.get(block.name, 0) - 1
        if left > 0:
            self._resident[block.name] = left
        else:
            self._resident.pop(block.name, None)
        if not block.media:
            del self._blocks[hash_]
