"""A relay that does nothing else: what gRPC in Python costs where a gateway stands.

    python -m loadtest.bench.bare_relay HOST:PORT

Passes each DispatchTurn on to that replica, and its messages back, as bytes: no session, no
placement, no bound, no fail-over. Prints the address it serves on; runs until it is ended.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import grpc
from grpc import aio

from workers.rpc import SERVICE


async def relay(endpoint: str) -> None:
    """Serves until cancelled."""
    async with aio.insecure_channel(endpoint) as channel:
        dispatch: Any = channel.unary_stream(f"/{SERVICE}/DispatchTurn")

        async def passed_on(data: bytes, context: Any) -> AsyncGenerator[bytes, None]:
            del context
            async for message in dispatch(data):
                yield message

        handler: Any = grpc.unary_stream_rpc_method_handler(passed_on)
        server = aio.server()
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"DispatchTurn": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        sys.stdout.write(f"127.0.0.1:{port}\n")
        sys.stdout.flush()
        await server.wait_for_termination()


if __name__ == "__main__":
    anyio.run(relay, sys.argv[1], backend_options={"use_uvloop": True})
