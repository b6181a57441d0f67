"""Where a session should go: the predicted time to its next first token, per replica, in ms.

For each replica that can take the session the cost is the sum of

* **prefill**: tokens it would have to compute, over its measured prefill rate,
* **transfer**: or pulling their KV from a replica that holds them, where that is faster,
* **queue**: prefill that is queued before this turn, and the wait for a place to run,
* **pressure**: what the sessions that already live there will cost this one over time.

Pressure is what keeps a shared system prompt from drawing every session to the one replica that
computed it first: computing a shared prefix again costs once per replica, contention costs every
turn. Its unit is the prefill of one turn, so its balance does not depend on how fast replicas are.

Pure and deterministic: equal costs are ordered by a rendezvous hash of session and replica, so
that gateways agree and nobody herds. After the cost model of NVIDIA Dynamo's KV router (overlap
against load), in milliseconds instead of weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gateway.core.fleet import FleetSnapshot, Replica
from gateway.core.machines import ReplicaState
from statestore.records import ReplicaRef

BYTES_PER_TOKEN = 4
"""Rough, for estimates of prefill only: gateways have no tokenizer."""
EVERY_PLACE_TAKEN = "every place is taken"


@dataclass(frozen=True, slots=True)
class PlacementModel:
    """Constants of the cost model."""

    default_prefill_tokens_per_s: float = 2_000.0
    """Assumed of a replica that has not measured its own rate yet."""
    default_decode_tokens_per_s: float = 30.0
    transfer_tokens_per_s: float = 20_000.0
    """KV pulled between replicas: about 46 kB a token at 1 GB/s, gather and scatter included."""
    transfer_setup_ms: float = 5.0
    turn_tokens: int = 512
    """New input of a typical turn: what one resident session costs the others when it is active."""
    turn_output_tokens: int = 200
    """Output of a typical turn: how long a place to run stays taken."""
    activity: float = 0.25
    """Share of its life that a session spends running rather than waiting for its tool."""
    min_free_share: float = 0.05
    """Below this share of free KV pages a replica must evict: its cost grows."""
    eviction_ms: float = 250.0

    def __post_init__(self) -> None:
        rates = (
            self.default_prefill_tokens_per_s,
            self.default_decode_tokens_per_s,
            self.transfer_tokens_per_s,
        )
        if min(rates) <= 0:
            raise ValueError("rates must be positive")
        if not 0 <= self.activity <= 1 or not 0 < self.min_free_share < 1:
            raise ValueError("activity and min_free_share are shares")


@dataclass(frozen=True, slots=True)
class Holder:
    """A replica that may hold the KV of the session's first ``tokens`` tokens: its previous owner,
    or the owner of the session it was forked from. A belief; the pull verifies."""

    ref: ReplicaRef
    tokens: int


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What is to be placed. ``new_tokens`` and ``leading_tokens`` are estimates: the gateway has
    no tokenizer."""

    session_id: str
    model: str
    history_tokens: int = 0
    """Length of the ledger."""
    new_tokens: int = 0
    """Input of the turn to come."""
    batch: bool = False
    """The turn to come is a batch turn: some places are not for it. One that is accepted goes on
    wherever there is any place."""
    leading_digest: str = ""
    """Hex; only meaningful while the ledger is empty."""
    leading_tokens: int = 0
    token_fingerprint: str = ""
    """Hex; empty before the first turn."""
    holders: tuple[Holder, ...] = ()
    exclude: Mapping[ReplicaRef, str] = field(default_factory=dict)
    """Replicas that just failed this session, with the reason."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted cost of one candidate, ms."""

    ref: ReplicaRef
    prefill_ms: float
    transfer_ms: float
    queue_ms: float
    pressure_ms: float
    cached_tokens: int
    """Prefix tokens believed to be resident there."""
    pull_from: ReplicaRef | None = None
    """Pull the prefix from this holder; None: what is missing is computed."""

    @property
    def total_ms(self) -> float:
        return self.prefill_ms + self.transfer_ms + self.queue_ms + self.pressure_ms


@dataclass(frozen=True, slots=True)
class Excluded:
    """Why a replica is no candidate."""

    ref: ReplicaRef
    why: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The best candidate, all costs (best first) and the replicas that were no candidates."""

    replica: Replica
    cost: Cost
    pull_from: Replica | None
    costs: tuple[Cost, ...]
    excluded: tuple[Excluded, ...]

    def __str__(self) -> str:
        """One line for a trace or a log: the cost of each candidate, the reason of each other."""
        parts = [
            f"{c.ref} {c.total_ms:.1f} ms (prefill {c.prefill_ms:.1f}, transfer "
            f"{c.transfer_ms:.1f}, queue {c.queue_ms:.1f}, pressure {c.pressure_ms:.1f})"
            for c in self.costs
        ]
        return "; ".join([*parts, *(f"{e.ref} no: {e.why}" for e in self.excluded)])


@dataclass(frozen=True, slots=True)
class NoCandidate:
    """Nobody can take the session now. ``overloaded``: at least one could, were it not full;
    ``retry_after_ms`` is then an estimate of when a place becomes free."""

    excluded: tuple[Excluded, ...]
    overloaded: bool
    retry_after_ms: int = 0

    def __str__(self) -> str:
        return "; ".join(f"{e.ref}: {e.why}" for e in self.excluded) or "the fleet is empty"


def place(
    fleet: FleetSnapshot, request: PlacementRequest, model: PlacementModel
) -> Decision | NoCandidate:
    """Chooses a replica. Mutates nothing; see the module's docstring for the cost."""
    candidates: list[Replica] = []
    excluded: list[Excluded] = []
    for replica in fleet.replicas:
        why = unfit(replica, request) or _taken(replica, request)
        if why is None:
            candidates.append(replica)
        else:
            excluded.append(Excluded(replica.ref, why))
    if not candidates:
        return _nobody(fleet, request, model, tuple(excluded))
    fewest = min(r.sessions for r in candidates)
    scored = sorted(
        ((_cost(fleet, replica, request, model, fewest), replica) for replica in candidates),
        key=lambda pair: (pair[0].total_ms, _rendezvous(request.session_id, pair[1].ref)),
    )
    cost, replica = scored[0]
    source = None if cost.pull_from is None else fleet.get(cost.pull_from)
    return Decision(replica, cost, source, tuple(c for c, _ in scored), tuple(excluded))


def relieve(
    fleet: FleetSnapshot, request: PlacementRequest, owner: Replica, model: PlacementModel
) -> Decision | NoCandidate:
    """Where a session goes whose owner refused a turn because every place is taken: to the best
    other replica, if the first token is predicted sooner there than after the wait for a place."""
    elsewhere = replace(request, exclude={**request.exclude, owner.ref: EVERY_PLACE_TAKEN})
    decision = place(fleet, elsewhere, model)
    if isinstance(decision, NoCandidate):
        return decision
    free = max(owner.details.places(batch=request.batch) - owner.turns, 0)
    full = replace(owner, assumed=replace(owner.assumed, turns=owner.assumed.turns + free))
    wait_ms, cost = _queue_ms(full, model), decision.cost
    if cost.prefill_ms + cost.transfer_ms + cost.queue_ms < wait_ms:
        return decision
    stays = Excluded(decision.replica.ref, "would take longer than the wait where the KV is")
    return NoCandidate((*decision.excluded, stays), True, int(wait_ms))


def unfit(replica: Replica, request: PlacementRequest) -> str | None:
    """Why this replica can never take the session as things stand, load aside; None if it can."""
    details = replica.details
    context = request.history_tokens + request.new_tokens
    if request.model and details.model != request.model:
        return f"serves {details.model}"
    if replica.state is not ReplicaState.READY:
        return f"is {replica.state}"
    if replica.ref in request.exclude:
        return request.exclude[replica.ref]
    if request.token_fingerprint and details.token_fingerprint != request.token_fingerprint:
        return "has another tokenizer or template"
    if request.history_tokens >= details.max_context_tokens:
        return f"takes {details.max_context_tokens} tokens of context at most"
    if context > details.capacity_pages * details.page_size:
        return f"has KV pages for {details.capacity_pages * details.page_size} tokens only"
    return None


def _taken(replica: Replica, request: PlacementRequest) -> str | None:
    if not replica.full(batch=request.batch):
        return None
    return EVERY_PLACE_TAKEN if replica.full(batch=False) else "has places for interactive ones"


def best_source(
    fleet: FleetSnapshot, target: Replica, request: PlacementRequest
) -> tuple[Replica, int] | None:
    """The live holder of the longest prefix whose KV ``target`` can use, and its tokens."""
    best: tuple[Replica, int] | None = None
    for holder in request.holders:
        replica = fleet.get(holder.ref)
        if replica is None or replica.stale or replica.state is ReplicaState.DOWN:
            continue
        if replica.details.kv_fingerprint != target.details.kv_fingerprint:
            continue
        if best is None or holder.tokens > best[1]:
            best = (replica, holder.tokens)
    return best


def prefill_rate(replica: Replica, model: PlacementModel) -> float:
    """Measured prefill rate in tokens/s, or the model's default."""
    return replica.load.prefill_tokens_per_s or model.default_prefill_tokens_per_s


def _cost(
    fleet: FleetSnapshot,
    replica: Replica,
    request: PlacementRequest,
    model: PlacementModel,
    fewest_sessions: int,
) -> Cost:
    per_token_ms = 1000.0 / prefill_rate(replica, model)
    context = max(request.history_tokens, _leading_tokens(fleet, request)) + request.new_tokens
    cached = _cached_tokens(fleet, replica, request)
    prefill_ms = max(context - cached, 1) * per_token_ms
    transfer_ms, pull_from = 0.0, None
    source = best_source(fleet, replica, request)
    if source is not None and source[0].ref != replica.ref and source[1] > cached:
        pulled = source[1] - cached
        pull_ms = model.transfer_setup_ms + pulled * 1000.0 / model.transfer_tokens_per_s
        if pull_ms < pulled * per_token_ms:
            transfer_ms, pull_from = pull_ms, source[0].ref
            prefill_ms = max(context - source[1], 1) * per_token_ms
    return Cost(
        replica.ref,
        prefill_ms,
        transfer_ms,
        _queue_ms(replica, model),
        _pressure_ms(replica, request, model, fewest_sessions, per_token_ms, fleet),
        cached,
        pull_from,
    )


def _leading_tokens(fleet: FleetSnapshot, request: PlacementRequest) -> int:
    """Tokens of the leading messages: as some replica counted them, else the caller's estimate."""
    if request.history_tokens or not request.leading_digest:
        return 0
    counted = max((r.leading_tokens(request.leading_digest) for r in fleet.replicas), default=0)
    return counted or request.leading_tokens


def _cached_tokens(fleet: FleetSnapshot, replica: Replica, request: PlacementRequest) -> int:
    if request.history_tokens:
        held = (h.tokens for h in request.holders if h.ref == replica.ref)
        return min(max(held, default=0), request.history_tokens)
    reported = replica.leading_tokens(request.leading_digest)
    if not reported and request.leading_digest in replica.assumed.leading:
        return _leading_tokens(fleet, request)
    return reported


def _queue_ms(replica: Replica, model: PlacementModel) -> float:
    prefill_ms = replica.pending_prefill_tokens * 1000.0 / prefill_rate(replica, model)
    places = max(replica.details.max_running_turns, 1)
    before = replica.turns - places + 1
    if before <= 0:
        return prefill_ms
    decode_rate = replica.load.decode_tokens_per_s or model.default_decode_tokens_per_s
    turn_ms = model.turn_output_tokens * 1000.0 / decode_rate
    return prefill_ms + turn_ms * before / places


def _pressure_ms(
    replica: Replica,
    request: PlacementRequest,
    model: PlacementModel,
    fewest_sessions: int,
    per_token_ms: float,
    fleet: FleetSnapshot,
) -> float:
    # For a new session the leading messages set the scale: after 1/activity sessions more than
    # the emptiest replica has, another copy of the shared prefix is worth its prefill.
    turn_tokens = max(model.turn_tokens, _leading_tokens(fleet, request))
    turn_ms = turn_tokens * per_token_ms
    crowding = model.activity * (replica.sessions - fewest_sessions) * turn_ms
    places = max(replica.details.max_running_turns, 1)
    running = min(replica.turns / places, 1.0) * model.turn_tokens * per_token_ms
    free_share = replica.load.free_pages / max(replica.details.capacity_pages, 1)
    eviction = max(0.0, 1.0 - free_share / model.min_free_share) * model.eviction_ms
    return crowding + running + eviction


def _nobody(
    fleet: FleetSnapshot,
    request: PlacementRequest,
    model: PlacementModel,
    excluded: tuple[Excluded, ...],
) -> NoCandidate:
    full = [r for r in fleet.replicas if unfit(r, request) is None]
    wait_ms = min((_queue_ms(r, model) for r in full), default=0.0)
    return NoCandidate(
        excluded,
        overloaded=bool(full),
        retry_after_ms=max(100, min(int(wait_ms), 30_000)),
    )


def _rendezvous(session_id: str, ref: ReplicaRef) -> bytes:
    """Lowest wins (highest-random-weight hashing, Thaler and Ravishankar 1998)."""
    return hashlib.blake2b(f"{session_id}\0{ref.replica_id}".encode(), digest_size=8).digest()
