"""Generations as requests to sglang: admission, parking, minimum lengths, stops, cancelling.

sglang has no pause for one request, needs a tokenizer for a minimum length, and stops at the
model's own end tokens: all of that is done here, on this side of its stream. A generation may take
several requests; each goes on from the tokens so far, whose KV the prefix cache still has.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from workers.engines.fair_shares import FairShares
from workers.engines.port import (
    EngineFailed,
    EngineFinish,
    EngineInfo,
    EngineOverloaded,
    GenerateRequest,
    OnStep,
    StepOutput,
)
from workers.engines.rates import StepRates

SGLANG_VERSIONS = ("0.5.23",)
"""What all of this was read against and tested with."""
PARKED_TOKENS = 256
"""Of a parked generation that are kept; past them it is taken back from sglang until it goes on."""
FORBIDDEN = -1e9
"""Logit bias of a token that must not be sampled yet."""
MIN_RETRY_MS, MAX_RETRY_MS = 100, 10_000
SEED_MASK = (1 << 63) - 1
"""sglang's seeds are signed, of 64 bits."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request to sglang."""

    rid: str
    """Unique for ever."""
    input_ids: list[int]
    sampling: dict[str, Any]
    salt: str
    """Keeps the cache of a namespace apart."""
    session_id: str
    """Under which sglang tags what the request leaves in its cache; empty: not at all."""
    priority: int
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C trace headers."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What came of a request. The last one has a ``finish`` (sglang's type) or an ``error``."""

    rid: str
    tokens: tuple[int, ...]
    cached_tokens: int
    seconds: float
    """Since the chunk before, or since the request was handed in."""
    finish: str | None = None
    error: str | None = None


class Sender(Protocol):
    """Where requests go. Chunks come back through :meth:`Generations.take`."""

    def generate(self, request: Request) -> None: ...

    def abort(self, rid: str) -> None:
        """Unknown ones are ignored; a chunk of a step under way may still come."""
        ...


class Pages(Protocol):
    """Is told which tokens a context has, as it grows."""

    def extend(self, tokens: Sequence[int]) -> None: ...


def salt_of(namespace: bytes, kv_fingerprint: bytes = b"") -> str:
    """The ``cache_salt`` by which sglang keeps a namespace apart, and in a storage that several
    share also the KV of a fingerprint: their own keys tell hardly more than the model's name."""
    salt = namespace.hex()
    return f"{salt}.{kv_fingerprint.hex()}" if kv_fingerprint else salt


def namespace_of(salt: str) -> bytes | None:
    """The namespace of a salt; None for one that is not ours."""
    try:
        return bytes.fromhex(salt.partition(".")[0])
    except ValueError:
        return None


@dataclass(slots=True, eq=False)
class _Generation:
    """One generation, over all the requests that it takes."""

    request: GenerateRequest
    pages: Pages
    limit: int
    """Tokens at most, by the request and by the context."""
    rid: str = ""
    """Of the request that sglang has now; empty: none."""
    input_tokens: int = 0
    """Of that request, until its first chunk has come."""
    output: list[int] = field(default_factory=list)
    """Everything delivered or held."""
    held: list[StepOutput] = field(default_factory=list)
    """What was generated while it is parked."""
    parked: bool = False
    started: bool = False
    """It has a place among those that run."""
    cached_tokens: int | None = None


class Generations:
    """All generations of one engine, on one event loop. ``context(namespace, tokens)`` begins the
    pages of a new one; ``salt`` gives sglang's name of a namespace (see :func:`salt_of`)."""

    def __init__(
        self,
        sender: Sender,
        info: EngineInfo,
        context: Callable[[bytes, Sequence[int]], Pages],
        salt: Callable[[bytes], str] = salt_of,
    ) -> None:
        self.info = info
        self.on_step: OnStep | None = None
        """None while the engine does not run."""
        self.failure: EngineFailed | None = None
        """Why not."""
        self.rates = StepRates()
        self._sender = sender
        self._context = context
        self._salt = salt
        self._loop = asyncio.get_running_loop()
        self._all: dict[str, _Generation] = {}
        self._by_rid: dict[str, _Generation] = {}
        self._queue: list[_Generation] = []
        self._shares = FairShares()
        self._due: dict[str, StepOutput] = {}
        self._delivery_due = False
        self._rids = 0
        self._prefix = uuid.uuid4().hex

    # -- reading ------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return sum(generation.started for generation in self._all.values())

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def prefill_tokens(self) -> int:
        """Of contexts that have no first token yet."""
        waiting = (g for g in self._all.values() if g.cached_tokens is None)
        return sum(len(generation.request.tokens) for generation in waiting)

    @property
    def pages(self) -> int:
        """That the contexts of those that run need."""
        size = self.info.page_size
        running = (g for g in self._all.values() if g.started)
        return sum(-(-(len(g.request.tokens) + len(g.output)) // size) for g in running)

    # -- the port's methods -------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> None:
        if self.on_step is None:
            raise self.failure or EngineFailed("the engine is not running")
        info, tokens = self.info, request.tokens
        if request.generation_id in self._all:
            raise ValueError(f"the tokens of generation {request.generation_id!r} come already")
        if not 1 <= len(tokens) < info.max_context_tokens:
            raise ValueError(
                f"a context of {len(tokens)} tokens; at least 1 and fewer than"
                f" {info.max_context_tokens} are possible"
            )
        if not 0 <= min(tokens) <= max(tokens) < info.vocab_size:
            raise ValueError(f"a token outside the vocabulary of {info.vocab_size}")
        if len(self._all) >= info.max_running + info.max_queued:
            raise EngineOverloaded(
                f"{len(self._all)} generations run or wait", self._retry_after_ms()
            )
        limit = min(request.max_new_tokens, info.max_context_tokens - len(tokens))
        generation = _Generation(request, self._context(request.namespace, tokens), limit)
        self._all[request.generation_id] = generation
        waits = any(it.request.namespace == request.namespace for it in self._queue)
        self._shares.arrived(request.namespace, waits=waits)
        self._queue.append(generation)
        self._pump()

    def park(self, generation_id: str) -> None:
        generation = self._all.get(generation_id)
        if generation is not None:
            generation.parked = True

    def unpark(self, generation_id: str) -> None:
        generation = self._all.get(generation_id)
        if generation is None or not generation.parked:
            return
        generation.parked = False
        held, generation.held = generation.held, []
        for output in held:
            self._deliver(output)
        if held and _ends(held[-1]):
            self._forget(generation)
        elif generation.started and not generation.rid:
            self._ask(generation)

    def cancel(self, generation_id: str) -> None:
        generation = self._all.get(generation_id)
        if generation is not None:
            self._due.pop(generation_id, None)
            self._retract(generation)
            self._forget(generation)

    def clear(self) -> None:
        """Ends every generation without output."""
        for generation_id in list(self._all):
            self.cancel(generation_id)

    # -- what comes back ----------------------------------------------------------------------

    def take(self, chunk: Chunk) -> None:
        generation = self._by_rid.get(chunk.rid)
        if generation is None or self.on_step is None:
            return  # cancelled meanwhile
        output = self._enter(generation, chunk)
        if chunk.finish is not None or chunk.error is not None:
            del self._by_rid[generation.rid]
            generation.rid = ""
        elif output.finish is not None:
            self._retract(generation)
        if generation.parked:
            generation.held.append(output)
            if not _ends(output) and sum(len(o.tokens) for o in generation.held) > PARKED_TOKENS:
                self._retract(generation)
            return
        if output.tokens or _ends(output):
            self._deliver(output)
        if _ends(output):
            self._forget(generation)
        elif not generation.rid:
            self._ask(generation)  # past its first part

    def _enter(self, generation: _Generation, chunk: Chunk) -> StepOutput:
        """What a chunk adds, up to where the generation ends."""
        request, tokens = generation.request, chunk.tokens
        finish: EngineFinish | None = None
        if chunk.error is None:
            self._measure(generation, chunk)
            for count, token in enumerate(tokens, 1):
                total = len(generation.output) + count
                if token in request.stop_token_ids and total > request.min_new_tokens:
                    tokens, finish = tokens[:count], EngineFinish.STOP_TOKEN
                    break
            generation.output += tokens
            generation.pages.extend(tokens)
            if finish is None and len(generation.output) >= generation.limit:
                finish = EngineFinish.MAX_TOKENS
        first = generation.cached_tokens is None
        if first:
            generation.cached_tokens = chunk.cached_tokens
        return StepOutput(
            request.generation_id,
            tokens,
            finish,
            generation.cached_tokens if first else None,
            chunk.error,
        )

    # -- requests -----------------------------------------------------------------------------

    def _pump(self) -> None:
        """Gives sglang what it has places for: by priority, then to the tenant that has had least,
        then first come first."""
        running = self.running
        while self._queue and running < self.info.max_running:
            generation = min(
                self._queue,
                key=lambda it: (-it.request.priority, self._shares.served(it.request.namespace)),
            )
            self._queue.remove(generation)
            generation.started = True
            running += 1
            if not generation.parked:
                self._ask(generation)

    def _ask(self, generation: _Generation) -> None:
        """Has sglang go on with a generation, from all that it has so far."""
        request = generation.request
        self._rids += 1
        # Unique among all who ask this server, and no beginning of another: sglang aborts every
        # request whose id begins with the one that it is given.
        generation.rid = f"{self._prefix}/{request.generation_id}#{self._rids}."
        self._by_rid[generation.rid] = generation
        generation.input_tokens = len(request.tokens) + len(generation.output)
        self._sender.generate(
            Request(
                generation.rid,
                [*request.tokens, *generation.output],
                self._sampling(generation),
                self._salt(request.namespace),
                request.retention_id,
                request.priority,
                request.trace,
            )
        )

    def _sampling(self, generation: _Generation) -> dict[str, Any]:
        request, done = generation.request, len(generation.output)
        sampling: dict[str, Any] = {
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "top_k": request.sampling.top_k or -1,
            "sampling_seed": request.sampling.seed & SEED_MASK,
            "max_new_tokens": generation.limit - done,
        }
        early = request.min_new_tokens - done
        if early > 0 and request.stop_token_ids:
            # What is past the minimum is asked for without this bias.
            sampling["max_new_tokens"] = min(early, generation.limit - done)
            sampling["logit_bias"] = {str(token): FORBIDDEN for token in request.stop_token_ids}
            sampling["ignore_eos"] = True
        elif request.stop_token_ids and {*self.info.eos_token_ids} <= request.stop_token_ids:
            sampling["stop_token_ids"] = sorted(request.stop_token_ids)
        else:
            sampling["ignore_eos"] = True  # stops are seen here
        return sampling

    def _retract(self, generation: _Generation) -> None:
        if generation.rid:
            del self._by_rid[generation.rid]
            self._sender.abort(generation.rid)
            generation.rid = ""

    def _forget(self, generation: _Generation) -> None:
        if self._all.pop(generation.request.generation_id, None) is not None:
            self._shares.left(generation.request.namespace)
        if generation in self._queue:
            self._queue.remove(generation)
        self._pump()

    # -- delivery -----------------------------------------------------------------------------

    def _deliver(self, output: StepOutput) -> None:
        """With everything else of this turn of the loop: what sglang computed in one step comes
        together."""
        due = self._due.get(output.generation_id)
        if due is not None:
            tokens = due.tokens + output.tokens
            output = replace(output, tokens=tokens, cached_tokens=due.cached_tokens)
        self._due[output.generation_id] = output
        if not self._delivery_due:
            self._delivery_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._delivery_due = False
        due, self._due = self._due, {}
        if due and self.on_step is not None:
            self.on_step([*due.values()])

    def _measure(self, generation: _Generation, chunk: Chunk) -> None:
        """Rates: of a request's first chunk its prefill, of others their step."""
        tenant = generation.request.namespace
        self._shares.charge(tenant, sampled=len(chunk.tokens))
        if generation.input_tokens:
            computed = generation.input_tokens - chunk.cached_tokens
            self._shares.charge(tenant, prompt=max(0, computed))
            self.rates.record(computed, False, chunk.seconds)
            generation.input_tokens = 0
        elif chunk.tokens:
            self.rates.record(0, True, chunk.seconds / len(chunk.tokens))

    def _retry_after_ms(self) -> int:
        rate = self.rates.prefill or 1.0
        waiting = sum(len(generation.request.tokens) for generation in self._queue)
        return int(min(max(1000.0 * waiting / rate, MIN_RETRY_MS), MAX_RETRY_MS))


def chunk_of(rid: str, answer: dict[str, Any], seconds: float) -> Chunk:
    """An answer of sglang's, in its own process or over HTTP."""
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    kind = None if reason is None else str(reason["type"])
    return Chunk(
        rid,
        tuple(answer["output_ids"]),
        int(meta["cached_tokens"]),
        seconds,
        kind,
        str(reason.get("message")) if reason and kind == "abort" else None,
    )


def _ends(output: StepOutput) -> bool:
    return output.finish is not None or output.error is not None
