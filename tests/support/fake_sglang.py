"""An HTTP server that answers as sglang's does, as far as a replica asks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

INFO = {
    "version": "0.5.23",
    "page_size": 16,
    "max_total_num_tokens": 1024,
    "max_req_input_len": 1018,
    "context_length": 8192,
    "incremental_streaming_output": False,
    "enable_session_radix_cache": True,
}


class FakeSglang:
    """The output of a generation counts on from its last input token, one token a chunk."""

    def __init__(self) -> None:
        self.url = ""
        self.info: dict[str, Any] = dict(INFO)
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        """(path, headers, body) of every call but those for health."""
        self.refusal: tuple[int, bytes] | None = None
        """Answered to /generate instead."""
        self.break_after: int | None = None
        """Chunks after which a stream is cut."""
        self.hold: asyncio.Event | None = None
        """Waited for before a stream's second chunk."""
        self.hold_at = 1
        """Or before this one; 0: before the headers too."""
        self.garbage: dict[str, Any] | None = None
        """Sent as the first event."""
        self.left: list[str] = []
        """Requests whose client went away while they were held."""
        self.away = 0.0
        """Times that it will not be there when it is asked for; math.inf: for good."""
        self.healthy = True
        self.probes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (line := await reader.readline()).strip():
                _, path, _ = line.decode().split(" ", 2)
                headers: dict[str, str] = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                content = json.loads(body) if body else {}
                if path == "/generate" and self.refusal is None:
                    self.asked.append((path, headers, content))
                    await self._generate(content, reader, writer)
                else:
                    await self._answer(path, headers, content, writer)
        except ConnectionError:
            pass  # the client went away
        finally:
            writer.close()

    async def _answer(
        self,
        path: str,
        headers: dict[str, str],
        body: dict[str, Any],
        writer: asyncio.StreamWriter,
    ) -> None:
        if path == "/health":
            self.probes += 1
            await _send(writer, 200 if self.healthy else 503, b"")
            return
        if path == "/model_info":
            there = self.away <= 0
            self.away -= not there
            await _send(writer, 200 if there else 503, b"{}")
            return
        self.asked.append((path, headers, body))
        if path == "/server_info":
            await _send(writer, 200, json.dumps(self.info).encode())
        elif path == "/generate" and self.refusal is not None:
            await _send(writer, *self.refusal)
        else:
            await _send(writer, 200, b"{}")

    async def _held(self, rid: str, reader: asyncio.StreamReader) -> None:
        """Raises ConnectionError if the client does not wait for it."""
        assert self.hold is not None
        go = asyncio.ensure_future(self.hold.wait())
        gone = asyncio.ensure_future(reader.read(1))  # who waits for an answer asks nothing more
        try:
            await asyncio.wait({go, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.left.append(rid)
                raise ConnectionError
        finally:
            for either in (go, gone):
                either.cancel()
            await asyncio.gather(go, gone, return_exceptions=True)

    async def _generate(
        self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.hold is not None and self.hold_at == 0:
            await self._held(body["rid"], reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        if self.garbage is not None:
            await _chunk(writer, b"data: " + json.dumps(self.garbage).encode() + b"\n\n")
        count, last = body["sampling_params"]["max_new_tokens"], body["input_ids"][-1]
        output: list[int] = []
        for index in range(count):
            if index == self.break_after:
                writer.transport.abort()
                return
            if index == self.hold_at and self.hold is not None:
                await self._held(body["rid"], reader)
            output.append(last + 1 + index)
            event = {
                "output_ids": output
                if not self.info["incremental_streaming_output"]
                else output[-1:],
                "meta_info": {
                    "cached_tokens": 16,
                    "finish_reason": {"type": "length"} if index + 1 == count else None,
                },
            }
            await _chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
        await _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@asynccontextmanager
async def fake_sglang() -> AsyncIterator[FakeSglang]:
    """On a free port of loopback."""
    fake = FakeSglang()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()


async def _send(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()
