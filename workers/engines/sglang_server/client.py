"""What is said over HTTP to an sglang server."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx2

from workers.engines.port import EngineFailed
from workers.engines.sglang_requests.generations import Request

PROBE_TIMEOUT_S = 60.0
"""sglang itself gives up a generation of its health check after 20 s."""
MAX_IDLE_S = 600.0
"""A stream without a byte for so long is given up; the turn's own time limits are shorter."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server tells of itself."""

    version: str
    page_size: int
    max_total_tokens: int
    max_input_tokens: int
    context_tokens: int
    incremental: bool
    """Its streams carry only what is new."""
    tags_sessions: bool
    """It keeps what session ids are said to use."""


class SglangClient:
    """One server. The caller closes it."""

    def __init__(self, url: str, api_key: str, timeout_s: float, connections: int) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        self._timeout_s = timeout_s
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=timeout_s,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=8),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def facts(self) -> ServerFacts:
        """Raises EngineFailed if the server cannot be asked or is no sglang server."""
        try:
            answer = await self._http.get("/server_info")
            answer.raise_for_status()
            info = answer.json()
            return ServerFacts(
                version=str(info["version"]),
                page_size=int(info["page_size"]),
                max_total_tokens=int(info["max_total_num_tokens"]),
                max_input_tokens=int(info["max_req_input_len"]),
                context_tokens=int(info["context_length"] or info["max_total_num_tokens"]),
                incremental=bool(info.get("incremental_streaming_output")),
                tags_sessions=bool(info.get("enable_session_radix_cache")),
            )
        except httpx2.HTTPError as error:
            raise EngineFailed(f"the sglang server {self._url} cannot be asked: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFailed(
                f"{self._url}/server_info is not an sglang server's: {error!r}"
            ) from error

    async def answers(self) -> bool:
        """Whether the server is there. Its scheduler may be busy."""
        try:
            return (await self._http.get("/model_info")).is_success
        except httpx2.HTTPError:
            return False

    async def generates(self) -> bool:
        """Whether the server says that it does: it generates one token, and waits for any output of
        its scheduler. There is none while that computes a long prompt."""
        try:
            return (await self._http.get("/health", timeout=PROBE_TIMEOUT_S)).is_success
        except httpx2.HTTPError:
            return False

    async def abort(self, rid: str) -> None:
        """Raises httpx2.HTTPError."""
        (await self._http.post("/abort_request", json={"rid": rid})).raise_for_status()

    async def close_session(self, session_id: str) -> None:
        """Raises httpx2.HTTPError."""
        body = {"session_id": session_id}
        (await self._http.post("/close_session", json=body)).raise_for_status()

    async def stream(self, request: Request, facts: ServerFacts) -> AsyncGenerator[dict[str, Any]]:
        """The answers to a request, each with only what is new in ``output_ids``. Raises
        httpx2.HTTPError, or ValueError with what the server finds wrong."""
        body: dict[str, Any] = {
            "input_ids": request.input_ids,
            "sampling_params": request.sampling,
            "stream": True,
            "rid": request.rid,
            "cache_salt": request.salt or None,
            "priority": request.priority or None,
        }
        if request.session_id and facts.tags_sessions:
            body["session_id"] = request.session_id
        timeout = httpx2.Timeout(self._timeout_s, read=MAX_IDLE_S)
        seen = 0
        async with self._http.stream(
            "POST", "/generate", json=body, headers=dict(request.trace), timeout=timeout
        ) as answer:
            if not answer.is_success:
                raise ValueError(f"HTTP {answer.status_code}: {(await answer.aread())[:500]!r}")
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(str(event["error"]))
                if not facts.incremental:
                    everything = event["output_ids"]
                    event["output_ids"], seen = everything[seen:], len(everything)
                yield event
