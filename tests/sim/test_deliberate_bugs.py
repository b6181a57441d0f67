"""Checkers that find nothing prove nothing: each rule is broken on purpose, and must be noticed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from sessile.v1 import types_pb2 as pb

from gateway.app.relay import TurnCursor
from loadtest.simulation.history import HistoryPlan, simulate
from statestore import script_runner
from statestore.executor import Script
from statestore.scripts import load_script
from workers.engines.port import GenerateRequest, PageMeta
from workers.engines.sim.engine import SimEngine
from workers.kv.pages import IncomingPages, checksum
from workers.turn import cursor
from workers.turn.cursor import TurnView

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def script_without(name: str, right: str, wrong: str) -> Patch:
    """The store's script ``name`` with one rule taken out."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        def load(asked: str) -> Script:
            script = load_script(asked)
            if asked != name:
                return script
            assert right in script.source, "the rule is written in another way now"
            return Script(asked, script.source.replace(right, wrong))

        monkeypatch.setattr(script_runner, "load_script", load)

    return patch


def deliver_before_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journal before delivery: clients get tokens that the ledger may never have."""

    def add_all(message: pb.TurnStream, view: TurnView, sent: int) -> int:
        output = view.output
        output.seal()
        event = output.event(sent, len(output.tokens))
        if event is None:
            return sent
        message.events.append(pb.TurnEvent(tokens=event))
        return sent + len(event.token_ids)

    monkeypatch.setattr(cursor, "_add_tokens", add_all)


def take_any_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """I5: pages are used without a look at their checksums."""

    commit = IncomingPages.commit

    async def wrong(self: IncomingPages, pages: Sequence[PageMeta]) -> int:
        found = [checksum(self.buffer(index)) for index in range(len(pages))]
        seen = [PageMeta(m.block_hash, c) for m, c in zip(pages, found, strict=True)]
        return await commit(self, seen)

    monkeypatch.setattr(IncomingPages, "commit", wrong)


def resume_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay forgets how far the client is."""
    monkeypatch.setattr(TurnCursor, "position", lambda self: None)


def changed_after_a_move(change: Callable[[GenerateRequest], GenerateRequest]) -> Patch:
    """Second and later attempts generate from something else."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        submit = SimEngine.submit

        def wrong(self: SimEngine, request: GenerateRequest) -> None:
            _, _, attempt, _ = request.generation_id.split("/")
            submit(self, request if attempt == "1" else change(request))

        monkeypatch.setattr(SimEngine, "submit", wrong)

    return patch


def without_a_token(request: GenerateRequest) -> GenerateRequest:
    return replace(request, tokens=[*request.tokens[:-2], request.tokens[-1]])


def with_another_seed(request: GenerateRequest) -> GenerateRequest:
    return replace(request, sampling=replace(request.sampling, seed=request.sampling.seed + 1))


def keep_the_pages_of_what_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """I9: a session that was closed leaves its KV with its owner."""
    monkeypatch.setattr(SimEngine, "drop", lambda self, block_hashes: 0)


@dataclass(frozen=True)
class Bug:
    name: str
    patch: Patch
    kinds: tuple[str, ...]


BUGS = [
    Bug(
        "a stale owner may append",
        script_without(
            "append", "if s.epoch ~= ARGV[1] or s.nonce ~= ARGV[2] then", "if false then"
        ),
        ("freeze_replica",),
    ),
    Bug(
        "an append is applied twice when its reply was lost",
        script_without(
            "append", "if s.length == ARGV[4] and s.digest == ARGV[5] then", "if true then"
        ),
        ("flaky_store",),
    ),
    Bug(
        "epochs stand still",
        script_without(
            "take", "grant(s, ARGV[3], ARGV[4], ARGV[5])", "set_owner(s, ARGV[3], ARGV[4])"
        ),
        ("kill_replica",),
    ),
    Bug(
        "an ended turn can be appended to",
        script_without("append", "if ended(s.turn_status) then", "if false then"),
        ("store_outage", "freeze_replica"),
    ),
    Bug(
        "tokens are delivered before they are journalled",
        deliver_before_the_journal,
        ("kill_replica", "store_outage"),
    ),
    Bug("KV pages are not verified", take_any_page, ("corrupt_pages", "migrate", "drain")),
    Bug("a moved stream starts over", resume_where_it_began, ("kill_replica",)),
    Bug(
        "a resumed context lacks a token", changed_after_a_move(without_a_token), ("kill_replica",)
    ),
    Bug(
        "a resumed turn draws another seed",
        changed_after_a_move(with_another_seed),
        ("kill_replica",),
    ),
    Bug(
        "a suspended session keeps its owner",
        script_without("suspend", "set_owner(s, '', '0')", "put(s, 'prev', '')"),
        ("kill_gateway",),
    ),
    Bug(
        "a purge takes what forks refer to",
        script_without(
            "purge", "if call('HINCRBY', KEYS[3], 'n:' .. id, -1) > 0 then", "if false then"
        ),
        ("kill_gateway",),
    ),
    Bug("a closed session keeps its pages", keep_the_pages_of_what_was_closed, ("migrate",)),
]


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_broken_rule_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.patch(monkeypatch)
    for seed in range(2000, 2012):
        report = simulate(seed, HistoryPlan(kinds=bug.kinds, storm_s=5.0))
        if report.violations:
            return
    pytest.fail("nobody noticed in 12 histories")
