"""Placement: predicted cost per replica in ms, with reasons, without herding."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from gateway.core.fleet import AssumedLoad, FleetSnapshot
from gateway.core.machines import ReplicaState
from gateway.core.placement import (
    Decision,
    Holder,
    NoCandidate,
    PlacementModel,
    PlacementRequest,
    place,
    relieve,
)
from statestore.records import ReplicaRef
from statestore.replica_info import ReplicaDetails, ReplicaLoad
from tests.support.fleets import MODEL, after, details, fleet, replica

CONFIG = PlacementModel()


def request(session_id: str = "ses_aaaa", **changes: object) -> PlacementRequest:
    return PlacementRequest(session_id=session_id, model=MODEL, **changes)  # type: ignore[arg-type]


def decided(snapshot: FleetSnapshot, asked: PlacementRequest) -> Decision:
    decision = place(snapshot, asked, CONFIG)
    assert isinstance(decision, Decision), decision
    return decision


@pytest.mark.parametrize("replicas", [2, 3])
def test_sessions_that_share_a_system_prompt_spread_over_idle_replicas(replicas: int) -> None:
    snapshot = fleet(*(replica(f"r{i}") for i in range(replicas)))
    chosen: Counter[str] = Counter()
    for number in range(24):
        asked = request(f"ses_{number:04}", leading_digest="d0", leading_tokens=2000)
        decision = decided(snapshot, asked)
        chosen[decision.replica.ref.replica_id] += 1
        snapshot = after(snapshot, decision, "d0")
    assert len(chosen) == replicas
    # No replica is left with more than 1/activity sessions above its fair share.
    assert max(chosen.values()) - min(chosen.values()) <= 1 / CONFIG.activity


def test_a_burst_between_two_heartbeats_spreads_by_assumed_load() -> None:
    load = {f"r{i}": AssumedLoad() for i in range(3)}
    chosen: Counter[str] = Counter()
    for number in range(24):
        snapshot = fleet(*(replica(name, assumed=load[name]) for name in load))
        asked = request(f"ses_{number:04}", leading_digest="d0", leading_tokens=2000)
        name = decided(snapshot, asked).replica.ref.replica_id
        chosen[name] += 1
        before = load[name]
        load[name] = AssumedLoad(
            before.turns + 1, before.prefill_tokens + 50, before.sessions + 1, frozenset({"d0"})
        )
    assert max(chosen.values()) - min(chosen.values()) <= 2


def test_a_resident_system_prompt_is_preferred_while_its_replica_is_not_crowded() -> None:
    warm = ReplicaLoad(
        free_pages=4096, prefill_tokens_per_s=2000.0, sessions=1, leading={"d0": 2000}
    )
    snapshot = fleet(replica("a"), replica("b", load=warm))
    decision = decided(snapshot, request(leading_digest="d0", leading_tokens=900))
    assert decision.replica.ref.replica_id == "b"
    assert decision.cost.cached_tokens == 2000
    other = next(c for c in decision.costs if c.ref.replica_id == "a")
    assert other.prefill_ms == pytest.approx(1000.0)  # 2000 tokens at 2000 tokens/s


def test_the_holder_of_a_long_history_wins_over_an_idle_stranger() -> None:
    busy = ReplicaLoad(free_pages=4096, prefill_tokens_per_s=2000.0, sessions=8, running_turns=3)
    snapshot = fleet(replica("a"), replica("b", load=busy))
    asked = request(history_tokens=20_000, holders=(Holder(ReplicaRef("b", 1), 20_000),))
    assert decided(snapshot, asked).replica.ref.replica_id == "b"


def test_a_history_is_pulled_away_from_a_holder_too_crowded_to_stay_with() -> None:
    crowded = ReplicaLoad(free_pages=4096, prefill_tokens_per_s=2000.0, sessions=30)
    snapshot = fleet(replica("a"), replica("b", load=crowded))
    asked = request(history_tokens=20_000, holders=(Holder(ReplicaRef("b", 1), 20_000),))
    decision = decided(snapshot, asked)
    assert decision.replica.ref.replica_id == "a"
    assert decision.cost.pull_from == ReplicaRef("b", 1)


def test_kv_is_pulled_from_a_holder_that_cannot_take_the_session_itself() -> None:
    draining = replica("b", state=ReplicaState.DRAINING)
    asked = request(history_tokens=20_000, holders=(Holder(draining.ref, 20_000),))
    decision = decided(fleet(replica("a"), draining), asked)
    assert decision.replica.ref.replica_id == "a"
    assert decision.pull_from is not None
    assert decision.pull_from.ref == draining.ref
    assert decision.cost.transfer_ms == pytest.approx(1005.0)  # 5 ms + 20,000 at 20,000/s
    assert [e.why for e in decision.excluded] == ["is DRAINING"]


def test_recomputing_beats_a_pull_that_is_slower() -> None:
    fast = ReplicaLoad(free_pages=4096, prefill_tokens_per_s=100_000.0)
    holder = replica("b", state=ReplicaState.DRAINING)
    asked = request(history_tokens=20_000, holders=(Holder(holder.ref, 20_000),))
    decision = decided(fleet(replica("a", load=fast), holder), asked)
    assert decision.pull_from is None
    assert decision.cost.prefill_ms == pytest.approx(200.0)


@pytest.mark.parametrize(
    "holder",
    [
        replica("b", state=ReplicaState.DRAINING, kv_fingerprint="cc" * 16),
        replica("b", state=ReplicaState.DOWN),
        replica("b", state=ReplicaState.DRAINING, stale=True),
        replica("b", state=ReplicaState.DRAINING, incarnation=2),
    ],
    ids=["other KV layout", "down", "stale", "restarted"],
)
def test_kv_is_not_pulled_from_whom_it_could_not_be_used(holder: object) -> None:
    asked = request(history_tokens=20_000, holders=(Holder(ReplicaRef("b", 1), 20_000),))
    decision = decided(fleet(replica("a"), holder), asked)  # type: ignore[arg-type]
    assert decision.pull_from is None


def test_queued_prefill_and_full_places_cost_time() -> None:
    queued = ReplicaLoad(
        free_pages=4096,
        prefill_tokens_per_s=2000.0,
        decode_tokens_per_s=50.0,
        queued_prefill_tokens=4000,
        running_turns=8,
        queued_turns=1,
    )
    decision = decided(fleet(replica("a"), replica("b", load=queued)), request())
    assert decision.replica.ref.replica_id == "a"
    cost = decision.costs[1]
    # 2 s of prefill, and two turns of 200 tokens at 50/s over eight places.
    assert cost.queue_ms == pytest.approx(2000.0 + 4000.0 * 2 / 8)


def test_a_replica_that_must_evict_is_avoided() -> None:
    tight = ReplicaLoad(free_pages=0, prefill_tokens_per_s=2000.0)
    decision = decided(fleet(replica("a", load=tight), replica("b")), request())
    assert decision.replica.ref.replica_id == "b"
    assert decision.costs[1].pressure_ms == pytest.approx(CONFIG.eviction_ms)


def test_ties_are_broken_by_session_alike_on_every_gateway_and_evenly() -> None:
    snapshot = fleet(*(replica(f"r{i}") for i in range(4)))
    chosen = Counter(
        decided(snapshot, request(f"ses_{n:04}")).replica.ref.replica_id for n in range(400)
    )
    assert min(chosen.values()) > 70
    again = Counter(
        decided(snapshot, request(f"ses_{n:04}")).replica.ref.replica_id for n in range(400)
    )
    assert chosen == again


def test_a_joining_replica_moves_no_tie_but_to_itself() -> None:
    before = fleet(*(replica(f"r{i}") for i in range(3)))
    joined = fleet(*(replica(f"r{i}") for i in range(4)))
    for number in range(200):
        asked = request(f"ses_{number:04}")
        old = decided(before, asked).replica.ref.replica_id
        assert decided(joined, asked).replica.ref.replica_id in (old, "r3")


def test_every_replica_that_is_no_candidate_has_its_reason() -> None:
    snapshot = fleet(
        replica("a", model="other"),
        replica("b", state=ReplicaState.SUSPECT),
        replica("c", token_fingerprint="dd" * 16),
        replica("d", max_context_tokens=500),
        replica("e", capacity_pages=4),
        replica("f", load=ReplicaLoad(running_turns=8, queued_turns=8)),
        replica("g"),
    )
    asked = request(
        history_tokens=600,
        token_fingerprint="aa" * 16,
        exclude={ReplicaRef("g", 1): "broke the stream"},
    )
    outcome = place(snapshot, asked, CONFIG)
    assert isinstance(outcome, NoCandidate)
    assert [e.why for e in outcome.excluded] == [
        "serves other",
        "is SUSPECT",
        "has another tokenizer or template",
        "takes 500 tokens of context at most",
        "has KV pages for 64 tokens only",
        "every place is taken",
        "broke the stream",
    ]
    assert outcome.overloaded
    assert outcome.retry_after_ms >= 100


def test_a_replica_that_is_full_for_batch_takes_interactive_turns() -> None:
    some = ReplicaLoad(prefill_tokens_per_s=2000.0, running_turns=8, queued_turns=3)
    half = ReplicaLoad(prefill_tokens_per_s=2000.0, running_turns=8, queued_turns=4)
    all_ = ReplicaLoad(prefill_tokens_per_s=2000.0, running_turns=8, queued_turns=8)
    snapshot = fleet(
        replica("a", load=half),
        replica("b", load=some, max_queued_turns=6),
        replica("c", load=all_),
    )
    decision = decided(snapshot, request())
    assert {cost.ref.replica_id for cost in decision.costs} == {"a", "b"}
    outcome = place(snapshot, request(batch=True), CONFIG)
    assert isinstance(outcome, NoCandidate)
    assert outcome.overloaded
    assert outcome.retry_after_ms >= 100
    assert [e.why for e in outcome.excluded] == [
        "has places for interactive ones",
        "has places for interactive ones",
        "every place is taken",
    ]
    known = json.loads(details().to_json())
    del known["batch_share"]  # an older one: batch turns may fill its queue
    unaware = replace(replica("a", load=half), details=ReplicaDetails.from_json(json.dumps(known)))
    assert decided(fleet(unaware), request(batch=True)).replica.ref.replica_id == "a"


def test_a_batch_turn_is_not_moved_to_where_batch_turns_have_no_place() -> None:
    half = ReplicaLoad(prefill_tokens_per_s=2000.0, running_turns=8, queued_turns=4)
    owner = replica("a")
    snapshot = fleet(owner, replica("b", load=half))
    assert isinstance(relieve(snapshot, request(batch=True), owner, CONFIG), NoCandidate)
    waits = relieve(fleet(owner, replica("b")), request(batch=True), owner, CONFIG)
    assert isinstance(waits, Decision)


def test_an_empty_fleet_and_an_unknown_model_are_told_apart_from_overload() -> None:
    outcome = place(fleet(), request(), CONFIG)
    assert outcome == NoCandidate((), overloaded=False, retry_after_ms=100)
    outcome = place(fleet(replica("a")), PlacementRequest("ses_a", "nope"), CONFIG)
    assert isinstance(outcome, NoCandidate)
    assert not outcome.overloaded


def test_a_decision_explains_itself() -> None:
    decision = decided(fleet(replica("a"), replica("b", model="other")), request(new_tokens=100))
    assert str(decision) == (
        "a#1 50.0 ms (prefill 50.0, transfer 0.0, queue 0.0, pressure 0.0); b#1 no: serves other"
    )


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="rates"):
        PlacementModel(transfer_tokens_per_s=0)
    with pytest.raises(ValueError, match="shares"):
        PlacementModel(activity=2.0)


@pytest.mark.parametrize(("history", "moves"), [(2_000, True), (200_000, False)])
def test_a_full_owner_is_left_only_if_moving_is_quicker_than_waiting(
    history: int, moves: bool
) -> None:
    """The wait: nine turns of 200 tokens at 30/s over eight places, 7.5 s."""
    owner = replica("a")
    other = replica("b", capacity_pages=20_000, max_context_tokens=10**6)
    asked = request(history_tokens=history, holders=(Holder(owner.ref, history),))
    decision = relieve(fleet(owner, other), asked, owner, CONFIG)
    assert isinstance(decision, Decision) is moves
    if isinstance(decision, Decision):
        assert decision.replica.ref == other.ref
        assert decision.pull_from == owner
    else:
        assert decision.overloaded
        assert decision.retry_after_ms == 7_500
