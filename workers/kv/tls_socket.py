"""TLS on sockets that never block: steps that are done once the socket lets them be.

asyncio's own TLS copies everything once more on its way out, and on the way in it loses what was
sent before the end of a stream that comes early.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import TypeVar

import anyio

T = TypeVar("T")


async def unblocked(connection: ssl.SSLSocket, step: Callable[[], T]) -> T:
    """The result of a step on a socket that never blocks, once the socket lets it be done."""
    while True:
        try:
            return step()
        except ssl.SSLWantReadError:
            await anyio.wait_readable(connection)
        except ssl.SSLWantWriteError:
            await anyio.wait_writable(connection)


def say_farewell(connection: ssl.SSLSocket) -> None:
    """A step: tells the peer that nothing more comes, and waits for none of its own."""
    try:
        connection.unwrap()
    except ssl.SSLWantReadError:
        return  # said; what it wants to read is the peer's


async def connected(host: str, port: int) -> socket.socket:
    """A socket that never blocks, to the first address of the host that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, address)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure
