"""The listener that Prometheus reads ``/metrics`` from, with or without TLS."""

from __future__ import annotations

import logging
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0
"""A connection that says nothing for so long is closed: each has a thread."""
MAX_CONNECTIONS = 16
"""At once, a thread each; one more is closed unheard."""
STOP_TIMEOUT_S = 3.0


@contextmanager
def serving(
    host: str, port: int, registry: CollectorRegistry, tls: Callable[[], ssl.SSLContext] | None
) -> Iterator[int]:
    """Serves until the block is left; gives the port. ``tls`` is asked for the context of each
    connection, so that certificates are renewed while it serves. Raises OSError."""

    places = BoundedSemaphore(MAX_CONNECTIONS)

    # Not prometheus_client's own start_http_server: it keeps the certificate that it began with,
    # and does handshakes where it accepts, so that one silent connection would stop all others.
    class Server(ThreadingWSGIServer):
        address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]

        def get_request(self) -> tuple[socket.socket, Any]:
            connection, address = super().get_request()
            if tls is None:
                return connection, address
            wrapped = tls().wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            return wrapped, address

        def process_request(self, request: Any, client_address: Any) -> None:
            if not places.acquire(blocking=False):
                self.shutdown_request(request)
                return
            try:
                super().process_request(request, client_address)
            except BaseException:  # no thread could be started
                places.release()
                raise

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                places.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            del request
            log.info("metrics could not be told to %s: %s", client_address, sys.exception())

    server = make_server(host, port, make_wsgi_app(registry), Server, _Handler)
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(STOP_TIMEOUT_S)


class _Handler(WSGIRequestHandler):
    timeout = READ_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base
        """Scrapes are not worth a line."""
