"""The client: connections to one or more gateways, for one tenant.

async with Sessile(["gw-1:8470", "gw-2:8470"], tenant="acme") as client:
    session = await client.open(system="You are brief.")
    print((await session.run("What is 6 * 7?").result()).text)
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc

from sessile.credentials import (
    Tls,
    Token,
    authorization,
    channel_credentials,
    warn_if_overheard,
)
from sessile.errors import InvalidRequest
from sessile.fleet import Fleet
from sessile.messages import (
    Message,
    Priority,
    Sampling,
    Tool,
    messages_to_pb,
    sampling_to_pb,
)
from sessile.records import SessionInfo, SessionState
from sessile.session import Session
from sessile.tracing import Tracing
from sessile.transport import TENANT_KEY, RetryPolicy, Runtime, Transport, built
from sessile.v1 import session_pb2

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

LIST_PAGE = 100


def _is_sendable(key: str, value: object) -> bool:
    """gRPC breaks the call otherwise, with an error of its own."""
    return key.endswith("-bin") or (
        isinstance(value, str) and value.isascii() and value.isprintable()
    )


def _shown(key: str, value: object) -> str:
    """A value of the metadata as an error may show it."""
    return "it is" if "authorization" in key.lower() else repr(value)


class Sessile:
    """Use it as ``async with``. ``target`` is one ``host:port`` or a list of gateways of the same
    fleet: any of them serves any session, and calls go to the next one when one fails.

    ``api_key`` (default: SESSILE_API_KEY) or ``token``, a JSON Web Token or what gives one for each
    call, says who calls; it also says the tenant, which only operators name. ``tls`` is True, or
    the PEM file of the authority that signs for the gateways (default: SESSILE_TLS, else without
    TLS); for a certificate of the client's own give gRPC's ``credentials`` instead.

    ``timeout_s`` limits calls other than turns; ``priority`` is that of turns that name none.
    ``metadata`` is sent with every call (for example
    the authorisation that a proxy wants). Where OpenTelemetry is installed each turn is a span and
    calls carry the trace, recorded by ``tracer_provider`` (default: the global one). Bound to the
    event loop on which it is entered."""

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        tenant: str | None = None,
        api_key: str | None = None,
        token: Token | None = None,
        tls: Tls | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        priority: Priority = Priority.INTERACTIVE,
        runtime: Runtime | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        self._targets = [target] if isinstance(target, str) else list(target)
        if not self._targets or not all(self._targets):
            raise InvalidRequest(
                "at least one gateway is needed.",
                reason="INVALID_REQUEST",
                hint="Give host:port of each.",
            )
        named = ((TENANT_KEY, tenant),) if tenant is not None else ()
        self._metadata = (*named, *metadata)
        for key, value in self._metadata:
            if not _is_sendable(key, value):
                raise InvalidRequest(
                    f"{key} cannot be sent as {_shown(key, value)}:",
                    reason="INVALID_REQUEST",
                    hint="A tenant and other metadata are plain ASCII text.",
                )
        self._authorization = authorization(api_key, token)
        self._renews = callable(token)
        self._credentials = channel_credentials(tls, credentials)
        secret = token is not None or bool(self._authorization())
        warn_if_overheard(self._targets, secret=secret, encrypted=self._credentials is not None)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._priority = built(lambda: Priority(priority))
        self._runtime = runtime or Runtime()
        self._tracing = Tracing(tracer_provider)
        self._opened: Transport | None = None

    async def __aenter__(self) -> Self:
        if self._opened is not None:
            raise RuntimeError("the client is open already")
        self._opened = Transport(
            self._targets,
            self._metadata,
            self._authorization,
            self._credentials,
            self._retry,
            self._runtime,
            self._timeout_s,
            self._tracing,
            renews=self._renews,
            priority=self._priority,
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        transport, self._opened = self._transport, None
        await transport.close()

    def with_options(
        self, *, timeout_s: float | None = None, retry: RetryPolicy | None = None
    ) -> Self:
        """This client, which must be open, under another ``timeout_s`` (seconds, of calls other
        than turns) or retry policy; what is left out stays. It shares the connections: only the
        original is closed."""
        view = copy.copy(self)
        view._opened = self._transport.with_options(timeout_s, retry)
        return view

    @property
    def fleet(self) -> Fleet:
        """The operator's calls."""
        return Fleet(self._transport)

    async def open(
        self,
        *,
        model: str = "",
        system: str = "",
        messages: Sequence[Message] = (),
        tools: Sequence[Tool] = (),
        labels: Mapping[str, str] | None = None,
        request_id: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> Session:
        """A new session. ``system`` goes before ``messages``; both are rendered with the first
        turn. ``tools`` are what the model may call: functions made tools by :func:`sessile.tool`
        (``session.run_tools`` calls them), or schemas alone. ``sampling`` sets the session's
        defaults. ``request_id`` makes it idempotent over process restarts too: the same id gives
        the same session."""
        response = await self._transport.call(
            lambda gateway: gateway.sessions.OpenSession,
            lambda: session_pb2.OpenSessionRequest(
                request_id=request_id or self._runtime.new_id(),
                model=model,
                messages=messages_to_pb([Message.system(system)] * bool(system))
                + messages_to_pb(messages),
                tools=[tool.to_pb() for tool in tools],
                default_params=sampling_to_pb(sampling),
                labels=labels,
            ),
        )
        info = SessionInfo.from_pb(response.session)
        return Session(self._transport, info.session_id, info, tools)

    def session(self, session_id: str) -> Session:
        """A handle to an existing session; asks nobody."""
        return Session(self._transport, session_id)

    async def list(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        states: Sequence[SessionState] = (),
        limit: int | None = None,
    ) -> AsyncGenerator[SessionInfo, None]:
        """The tenant's sessions, newest first, page by page: those with all of ``labels``, in one
        of ``states`` (default: open and suspended), ``limit`` at most."""
        wanted = built(
            lambda: [session_pb2.SessionState.Value(f"SESSION_STATE_{s.name}") for s in states]
        )
        left = limit
        token = ""
        while left is None or left > 0:
            response = await self._transport.call(
                lambda gateway: gateway.sessions.ListSessions,
                partial(
                    session_pb2.ListSessionsRequest,
                    page_size=LIST_PAGE if left is None else min(left, LIST_PAGE),
                    page_token=token,
                    labels=labels,
                    states=wanted,
                ),
            )
            for session in response.sessions:
                yield SessionInfo.from_pb(session)
            token = response.next_page_token
            if not token:
                return
            if left is not None:
                left -= len(response.sessions)

    @property
    def _transport(self) -> Transport:
        if self._opened is None:
            raise RuntimeError("use the client inside `async with`")
        return self._opened
