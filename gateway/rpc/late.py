"""Services that are not there yet: for the time in which a process listens and cannot serve.

Who watches a process sees it from its first moment on (its health says NOT_SERVING), and who calls
it is told what it waits for and that it is worth trying again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
from grpc import aio

from gateway.core.errors import Unavailable
from gateway.rpc.status import abort

RETRY_AFTER_MS = 1000


class LateServices(grpc.GenericRpcHandler):
    """Handlers for a server that has started; register it before the start. Services are added to
    it as to a server. Until :meth:`open` every call ends UNAVAILABLE with ``reason``."""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self._open = False
        self._handlers: list[grpc.GenericRpcHandler] = []

    def open(self) -> None:
        """From now on the services answer."""
        self._open = True

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._handlers.extend(handlers)

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not self._open:
            return grpc.stream_stream_rpc_method_handler(self._refuse)
        for handler in self._handlers:
            found = handler.service(call)
            if found is not None:
                return found
        return None

    async def _refuse(self, requests: Any, context: aio.ServicerContext[Any, Any]) -> NoReturn:
        await abort(context, Unavailable(self._reason, retry_after_ms=RETRY_AFTER_MS))
