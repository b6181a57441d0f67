"""Clients of the fleet that use the SDK as an application does, with its own retries.

What the SDK hands out is put back into the wire's form and judged as what plain clients hear: so
the SDK's stitching of streams is judged against the ledger, and not by itself.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import sessile
from sessile.transport import KEEPALIVE_MS, Runtime
from sessile.v1 import types_pb2 as pb

from gateway.core import errors
from tests.faults.agents import PATIENCE_S, TURN_S, Agent, Heard

TRY_AGAIN = (sessile.Unavailable, sessile.Overloaded, sessile.DeadlineExceeded)
"""What a patient application asks again after, once the SDK's own retries are used up."""
T = TypeVar("T")


class SdkAgent(Agent):
    """One session's client, by the SDK alone; its plain connections serve the checks."""

    notices_silence_s = KEEPALIVE_MS * 1.5 / 1000

    def __init__(
        self, name: str, endpoints: dict[str, str], draw: random.Random, *, lossy: bool = False
    ) -> None:
        super().__init__(name, endpoints, draw, lossy=lossy)
        self._client: sessile.Sessile | None = None
        self._session: sessile.Session | None = None

    async def open(self) -> None:
        targets = [door.endpoint for door in self.doors]
        self._client = client = sessile.Sessile(
            targets, runtime=Runtime(rng=_BeginsWithTheFirst(self.name))
        )
        await client.__aenter__()
        self._session = await self._insist(
            lambda: client.open(system="Be brief.", request_id=self.name)
        )
        self.session_id = self._session.session_id

    async def close(self) -> None:
        await self._insist(self.session.close)

    async def cancel(self, turn_id: str) -> None:
        await self._insist(lambda: self.session.cancel(turn_id))

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.__aexit__(None, None, None)
        await super().aclose()

    @property
    def session(self) -> sessile.Session:
        """The SDK's handle; there is one once it is open."""
        assert self._session is not None
        return self._session

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        until = anyio.current_time() + TURN_S
        while True:
            try:
                return await ask()
            except TRY_AGAIN:
                if anyio.current_time() > until:
                    raise
                await anyio.sleep(self._draw.uniform(0.1, 0.5))

    async def run(self, heard: Heard) -> None:
        heard.began = anyio.current_time()
        until = heard.began + TURN_S + PATIENCE_S
        while not heard.ended:
            if anyio.current_time() > until:
                heard.violations.append("I7: it has no end")
                return
            await self.listen(heard)
        await self._conclude(heard)

    async def listen(self, heard: Heard, *, leave_after: int = 0) -> None:
        """One reading by the SDK, which may take several streams, until it ends or gives up; what
        it gave up is attached to again where it stopped."""
        heard.begin_stream()
        heard.streams += 1
        turn = self._turn(heard)
        try:
            async for event in turn:
                shown = on_the_wire(event, heard)
                if shown is not None:
                    heard.hear(shown)
        except TRY_AGAIN:
            await anyio.sleep(self._draw.uniform(0.1, 0.5))
        except sessile.SessileError as error:
            heard.ended_at = anyio.current_time()
            heard.error = as_told(error, heard)
        else:
            if not heard.ended:
                heard.violations.append("I2: the SDK's turn ended without an end")

    def _turn(self, heard: Heard) -> sessile.Turn:
        place = heard.resume_from or heard.start
        if place is not None:
            return self.session.attach(
                heard.turn_id, resume_from=sessile.Position.from_pb(place), timeout_s=TURN_S
            )
        request = heard.request
        return self.session.run(
            [sessile.Message.from_pb(message) for message in request.messages],
            turn_id=heard.turn_id,
            timeout_s=request.timeout_ms / 1000,
            on_abandon="detach",
            max_tokens=request.params.max_tokens,
            temperature=request.params.temperature,
            seed=request.params.seed,
            ignore_eos=request.params.ignore_eos,
        )

    async def _conclude(self, heard: Heard) -> None:
        losses = self.losses
        await super()._conclude(heard)
        if self.losses > losses:
            await self._insist(self.session.refresh)


class _BeginsWithTheFirst(random.Random):
    """The SDK draws the gateway that it begins with; here it is the preferred one."""

    def randrange(self, *_: object) -> int:
        return 0


def as_told(error: sessile.SessileError, heard: Heard) -> errors.SessileError:
    """The error of the same name. A turn that was accepted and is not found is a loss."""
    if isinstance(error, sessile.NotFound) and heard.start is not None:
        return errors.DataLoss(error.message)
    kind = getattr(errors, type(error).__name__, None)
    if kind is None:
        heard.violations.append(f"I2: the SDK says {type(error).__name__}: {error}")
        kind = errors.InternalError
    made = kind(error.message, metadata=error.metadata)
    assert isinstance(made, errors.SessileError)
    return made


def on_the_wire(event: sessile.TurnEvent, heard: Heard) -> pb.TurnEvent | None:
    """An event of the SDK in the form of the stream that it was made from."""
    match event:
        case sessile.Accepted():
            return pb.TurnEvent(
                accepted=pb.TurnAccepted(
                    turn_id=event.turn_id,
                    turn_index=event.turn_index,
                    output_start=event.output_start.to_pb(),
                    seed=event.seed,
                    attempt=event.attempt,
                    replica=_ref(event.replica),
                    cached_tokens=event.cached_tokens,
                    attached=event.attached,
                )
            )
        case sessile.Tokens():
            return pb.TurnEvent(
                tokens=pb.TurnTokens(
                    position=event.position,
                    token_ids=event.token_ids,
                    digest=event.end.digest,
                    text=event.text,
                    text_offset=event.text_offset,
                )
            )
        case sessile.Moved():
            return pb.TurnEvent(moved=pb.TurnMoved(to=_ref(event.target), attempt=event.attempt))
        case sessile.Finished():
            return pb.TurnEvent(finished=_end(event, heard))
    return None


def _end(event: sessile.Finished, heard: Heard) -> pb.TurnFinished:
    """The SDK keeps where the text ends to itself: it has checked it."""
    return pb.TurnFinished(
        status=pb.TurnStatus.Value(f"TURN_STATUS_{event.status.name}"),
        reason=pb.FinishReason.Value(f"FINISH_REASON_{event.reason.name}"),
        end=event.end.to_pb(),
        usage=pb.Usage(
            input_tokens=event.usage.input_tokens,
            cached_tokens=event.usage.cached_tokens,
            output_tokens=event.usage.output_tokens,
        ),
        text=event.text,
        text_offset=event.text_offset,
        text_end=len(heard.text) + len(event.text),
        error=event.error,
    )


def _ref(ref: sessile.ReplicaRef) -> pb.ReplicaRef:
    return pb.ReplicaRef(replica_id=ref.replica_id, incarnation=ref.incarnation)
