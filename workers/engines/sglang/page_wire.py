"""What sglang's scheduler processes and their worker say to each other about pages.

One connection a thread over a Unix socket, question and answer in turn: a length (4 bytes, little
endian), then JSON. The pages themselves are never sent: both map the same file, whose descriptor
follows the answer to the first question.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

MAX_MESSAGE_BYTES = 1 << 20
ANSWER_TIMEOUT_S = 10.0
HELLO_TIMEOUT_S = 600.0
"""The first answer waits until the kernel has set all of the memory aside."""


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Raises OSError, or ValueError for a message over the limit."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes")
    connection.sendall(len(data).to_bytes(4, "little") + data)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """None at the end of the stream. Raises OSError, or ValueError for what is no message."""
    head = _exactly(connection, 4)
    if head is None:
        return None
    size = int.from_bytes(head, "little")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes")
    data = _exactly(connection, size)
    if data is None:
        raise ConnectionError("the stream ended in a message")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    return message


def send_file(connection: socket.socket, descriptor: int) -> None:
    """The other side gets a descriptor of its own. Raises OSError."""
    socket.send_fds(connection, [b"\0"], [descriptor])


def receive_file(connection: socket.socket) -> int:
    """The descriptor that :func:`send_file` sent, for the caller to close. Raises OSError."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if len(descriptors) != 1:
        raise ConnectionError("no file came with the answer")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            if data:
                raise ConnectionError("the stream ended in a message")
            return None
        data += piece
    return bytes(data)
