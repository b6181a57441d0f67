"""What the agents received against what the store holds, read raw from the store's keys.

Nothing of the product is asked: ledgers are strings of little-endian uint32, a turn's span of
output and its status are fields of the session's hash. So a fault of the product's own reading
code cannot hide a fault of its writing.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loadtest.demo.board import AgentState, TurnLog


class RawKeys(Protocol):
    """What the audit needs of a Redis client."""

    def get(self, name: str, /) -> object: ...

    def hget(self, name: str, key: str, /) -> object: ...


@dataclass(slots=True)
class Audit:
    """Counts of tokens, and of turns that did not end. All must be zero but ``checked``."""

    checked: int = 0
    """Output tokens in the ledgers."""
    lost: int = 0
    """In the ledger and never received."""
    repeated: int = 0
    """Received more than once."""
    altered: int = 0
    """Received at a place where the ledger holds another token, or none."""
    hanging: int = 0
    """Turns that the store does not hold as committed."""
    problems: list[str] = field(default_factory=list)
    ledgers: list[tuple[int, ...]] = field(default_factory=list)
    """As read, in the agents' order; not part of the report."""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.repeated or self.altered or self.hanging or self.problems)


def audit(store: RawKeys, agents: Sequence[AgentState]) -> Audit:
    """Checks every turn of every agent. Blocks."""
    found = Audit()
    for agent in agents:
        if agent.session_id:
            _check_session(store, agent, found)
        else:
            found.problems.append(f"{agent.name} never opened its session")
    return found


def _check_session(store: RawKeys, agent: AgentState, found: Audit) -> None:
    family = agent.session_id.removeprefix("ses_")
    record, ledger = (f"sessile:{{{family}}}:{kind}:{agent.session_id}" for kind in "sl")
    raw = store.get(ledger)
    data = raw if isinstance(raw, bytes) else b""
    tokens = struct.unpack(f"<{len(data) // 4}I", data)
    found.ledgers.append(tokens)
    if active := _field(store, record, "active"):
        found.problems.append(f"{agent.name}: turn {active} is still active in the store")
    end = 0
    for turn in agent.turns:
        end = _check_turn(store, record, agent.name, turn, tokens, found)
    if end != len(tokens):
        found.problems.append(
            f"{agent.name}: {len(tokens)} tokens in the ledger, turns end at {end}"
        )


def _check_turn(
    store: RawKeys, record: str, name: str, turn: TurnLog, ledger: Sequence[int], found: Audit
) -> int:
    """The turn's end according to the store."""
    status, start, end = (
        _field(store, record, f"t:{turn.turn_id}:{key}")
        for key in ("status", "start_len", "end_len")
    )
    if status != "COMMITTED":
        found.hanging += 1
        found.problems.append(f"{name}: turn {turn.turn_id} is {status or 'not in the store'}")
        return int(end or 0)
    if int(end) > len(ledger):
        found.problems.append(f"{name}: turn {turn.turn_id} ends at {end} of {len(ledger)} tokens")
    span = range(int(start), min(int(end), len(ledger)))
    received = Counter[int]()
    for arrival in turn.arrivals:
        for position, token in enumerate(arrival.token_ids, arrival.position):
            received[position] += 1
            if position not in span or ledger[position] != token:
                found.altered += 1
    found.checked += len(span)
    found.lost += sum(position not in received for position in span)
    found.repeated += sum(count - 1 for count in received.values())
    return int(end)


def _field(store: RawKeys, key: str, name: str) -> str:
    value = store.hget(key, name)
    return value.decode() if isinstance(value, bytes) else ""


def common_prefix(ledgers: Sequence[Sequence[int]]) -> int:
    """Tokens that all ledgers begin with: the system prompt, as the model's template renders it."""
    shared = 0
    for tokens in zip(*ledgers, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared
