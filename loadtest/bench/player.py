"""A replica that computes nothing: it plays canned turns as fast as its gateway takes them.

    python -m loadtest.bench.player unix:///…/store.sock

What a gateway relays at most cannot be shown with a worker beside it on two cores: a worker takes
longer for a token than a gateway does. This process is registered in the store and beats as a
worker does (model ``player``), but a dispatched turn is ``max_tokens / 16`` messages made once, of
16 tokens each, between TurnAccepted and TurnFinished. Nothing is written to a ledger. Prints the
address it serves on; runs until it is ended.
"""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import anyio
import grpc
from grpc import aio
from sessile.v1 import replica_pb2
from sessile.v1 import types_pb2 as pb

from statestore.records import ReplicaRegistration, UsageSum
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from statestore.replica_info import ReplicaDetails, ReplicaLoad
from workers.heartbeat import heartbeat
from workers.rpc import SERVICE

MODEL = "player"
TOKENS_PER_MESSAGE = 16
VOCABULARY = 32_000
FREE_PAGES = 1 << 20


class Idle:
    """What the heartbeat tells of a replica that has nothing to do."""

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(free_pages=FREE_PAGES)

    def store_answered(self, answered: bool) -> None: ...

    def doubt(self) -> None: ...

    def unreported_usage(self) -> Mapping[str, UsageSum]:
        return {}

    def usage_reported(self, sums: Mapping[str, UsageSum]) -> None: ...


def canned(messages: int) -> list[bytes]:
    """Streams of tokens as a worker sends them for English text: ids of two or three bytes, some
    four characters of text a token, a digest."""
    draw = random.Random(0)
    found = []
    for number in range(messages):
        tokens = pb.TurnTokens(
            position=number * TOKENS_PER_MESSAGE,
            token_ids=[draw.randrange(VOCABULARY) for _ in range(TOKENS_PER_MESSAGE)],
            digest=draw.randbytes(16),
            text="word" * TOKENS_PER_MESSAGE,
            text_offset=number * TOKENS_PER_MESSAGE * 4,
        )
        found.append(pb.TurnStream(events=[pb.TurnEvent(tokens=tokens)]).SerializeToString())
    return found


def details(endpoint: str) -> ReplicaDetails:
    """As another worker's."""
    return ReplicaDetails(
        endpoint=endpoint,
        model=MODEL,
        engine="player",
        token_fingerprint=bytes(16).hex(),
        kv_fingerprint=bytes(16).hex(),
        page_size=16,
        capacity_pages=FREE_PAGES,
        max_context_tokens=1 << 20,
        max_running_turns=1024,
        max_queued_turns=1024,
    )


async def play(url: str) -> None:
    """Serves until cancelled."""
    made: dict[int, list[bytes]] = {}

    async def dispatch(data: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        del context
        request = replica_pb2.DispatchTurnRequest.FromString(data)
        count = request.turn.params.max_tokens // TOKENS_PER_MESSAGE
        accepted = pb.TurnAccepted(
            turn_id=request.turn.turn_id, output_start=pb.Position(), replica=request.replica
        )
        yield pb.TurnStream(events=[pb.TurnEvent(accepted=accepted)]).SerializeToString()
        if count not in made:
            made[count] = canned(count)
        for message in made[count]:
            yield message
        finished = pb.TurnFinished(
            status=pb.TURN_STATUS_COMMITTED, end=pb.Position(length=count * TOKENS_PER_MESSAGE)
        )
        yield pb.TurnStream(events=[pb.TurnEvent(finished=finished)]).SerializeToString()

    handler: Any = grpc.unary_stream_rpc_method_handler(dispatch)
    server = aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"DispatchTurn": handler}),)
    )
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with aclosing(await connect(url)) as executor:
        store = RedisStore(executor)
        registration = ReplicaRegistration(MODEL, details(endpoint).to_json())
        ref = await store.register_replica(registration)
        sys.stdout.write(f"{endpoint}\n")
        sys.stdout.flush()
        await heartbeat(store, ref, Idle(), 0.5)


if __name__ == "__main__":
    anyio.run(play, sys.argv[1], backend_options={"use_uvloop": True})
