"""What must be true of a session's ledger and of what its clients heard, recomputed from the ledger
alone. Pure: of the simulation and of real processes alike."""

from __future__ import annotations

from collections.abc import Sequence

from sessile.v1 import types_pb2 as pb

from loadtest.simulation.checkers.reference import (
    Digests,
    answer,
    rendered,
    stop_string_at,
    text_of,
)
from loadtest.simulation.clients.heard import TurnHeard
from statestore.records import FinishReason, Session, Turn, TurnStatus
from workers.engines.sim.config import SimConfig

STATUS = {
    pb.TURN_STATUS_COMMITTED: TurnStatus.COMMITTED,
    pb.TURN_STATUS_CANCELLED: TurnStatus.CANCELLED,
    pb.TURN_STATUS_FAILED: TurnStatus.FAILED,
}
REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    pb.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
    pb.FINISH_REASON_ERROR: FinishReason.ERROR,
}
BY_STATUS = {
    TurnStatus.CANCELLED: {FinishReason.CANCELLED},
    TurnStatus.FAILED: {FinishReason.DEADLINE, FinishReason.ERROR},
}
"""Status of a turn that did not come to its own end -> the reasons it may give."""
ASKED = ("temperature", "top_p", "top_k", "seed", "min_tokens")
"""Parameters that are obeyed as the client set them."""


def check_session(
    session: Session,
    turns: Sequence[Turn],
    ledger: Sequence[int],
    salt: bytes,
    engine: SimConfig,
    heard: Sequence[TurnHeard],
) -> list[str]:
    """The ledger, and all that clients heard of it."""
    found = check_ledger(session, turns, ledger, salt, engine)
    by_id = {turn.spec.turn_id: turn for turn in turns}
    for it in heard:
        complaints = [*it.violations]
        turn = by_id.get(it.turn_id)
        if it.given_up:
            pass
        elif turn is not None:
            complaints += check_heard(it, turn, ledger, salt)
            complaints += check_asked(it, turn, engine)
        elif it.start is not None:
            complaints.append("I7: it was accepted and is not in the ledger")
        found += [f"{it.turn_id}: {complaint}" for complaint in complaints]
    return found


def check_ledger(
    session: Session,
    turns: Sequence[Turn],
    ledger: Sequence[int],
    salt: bytes,
    engine: SimConfig,
) -> list[str]:
    """The turns cover the ledger without gap or overlap, each has ended, and each says what the
    model says after exactly the tokens before it."""
    found: list[str] = []
    digests = Digests(salt, ledger)
    if len(ledger) != session.head.length:
        return [f"I1: {len(ledger)} tokens are there of {session.head.length}"]
    if digests.at(len(ledger)) != session.head.digest:
        found.append("I1: the ledger does not have its head's digest")
    if len({turn.spec.turn_id for turn in turns}) != len(turns):
        found.append("I3: a turn id is in the ledger twice")
    end = 0
    for index, turn in enumerate(turns):
        name, start = turn.spec.turn_id, turn.output_start.length
        if (turn.index, turn.input_start) != (index, end):
            found.append(f"{name}: I3: turn {turn.index} starts at {turn.input_start}, not {end}")
        if not turn.status.ended:
            found.append(f"{name}: I7: it is {turn.status}")
        given = list(ledger[turn.input_start : start])
        messages = body_of(turn).messages
        if given != rendered(session.preamble, messages, ledger[: turn.input_start]):
            found.append(f"{name}: P18: its input is not in the ledger as given")
        found += [
            f"{name}: P1: its digest at {place.length} is not the ledger's"
            for place in (turn.output_start, turn.output_end)
            if digests.at(place.length) != place.digest
        ]
        found += [f"{name}: {what}" for what in check_output(turn, ledger, engine)]
        end = turn.output_end.length
    if end != len(ledger):
        found.append(f"I1: the ledger has {len(ledger)} tokens, its turns end at {end}")
    return found


def body_of(turn: Turn) -> pb.RunTurnRequest:
    """A turn's request with its resolved parameters, as stored."""
    return pb.RunTurnRequest.FromString(turn.spec.body)


def check_output(turn: Turn, ledger: Sequence[int], engine: SimConfig) -> list[str]:
    """The output is what the model says, and ends where it should, for the reason it gives."""
    start, end = turn.output_start.length, turn.output_end.length
    output, params = list(ledger[start:end]), body_of(turn).params
    whole = answer(ledger[:start], params, engine)
    if output != whole.tokens[: len(output)]:
        return ["I2: its output is not what the model says after this context"]
    committed = turn.status is TurnStatus.COMMITTED
    if committed and output != whole.tokens:
        if stop_string_at(whole.tokens, params) is not None:
            return ["P17: it ended at a stop string, whose tokens are not all in the ledger"]
        return [f"P5: it was committed after {len(output)} tokens of {len(whole.tokens)}"]
    if turn.result is None:
        return ["P5: it has no result"]
    own_end = FinishReason.STOP if whole.stopped else FinishReason.LENGTH
    if turn.result.reason not in ({own_end} if committed else BY_STATUS.get(turn.status, set())):
        return [f"P5: it is {turn.status}, its reason is {turn.result.reason}"]
    text = text_of(output, params)
    if committed and turn.result.text_end != len(text):
        return [f"P17: its text ends at {turn.result.text_end}, not {len(text)}"]
    return []


def check_heard(heard: TurnHeard, turn: Turn, ledger: Sequence[int], salt: bytes) -> list[str]:
    """What a client received is a prefix of the ledger's, and all of it once it was told so."""
    if heard.start is None and heard.finished is None:
        return []
    found: list[str] = []
    start, end = turn.output_start.length, turn.output_end.length
    output, params = list(ledger[start:end]), body_of(turn).params
    if heard.start is not None and (heard.start.length, heard.index) != (start, turn.index):
        place = f"{heard.start.length} as turn {heard.index}"
        found.append(f"I2: accepted at {place}, not {start} as turn {turn.index}")
    if heard.start is not None and heard.seed != params.seed:
        found.append(f"P4: told the seed {heard.seed}, the ledger says {params.seed}")
    if heard.tokens != output[: len(heard.tokens)]:
        found.append("I2: the client has other tokens than the ledger")
    digests = Digests(salt, ledger)
    told = {} if heard.start is None else {heard.start.length: heard.start.digest}
    for length, digest in [*told.items(), *heard.digests.items()]:
        if digest != digests.at(length):
            found.append(f"P1: the digest told at {length} is not the ledger's")
            break
    text = text_of(output, params)
    if not text.startswith(heard.text):
        found.append("P17: the client has other text than the ledger's tokens say")
    if heard.finished is not None:
        found += _check_finished(heard, heard.finished, turn, output, digests, text)
    return found


def check_asked(heard: TurnHeard, turn: Turn, engine: SimConfig) -> list[str]:
    """The turn that a client heard was stored as it asked for it (P4)."""
    asked, stored = heard.request, body_of(turn)
    if heard.start is None:
        return []
    if asked.messages and list(asked.messages) != list(stored.messages):
        return ["P4: it was stored with other messages than its client's"]
    wrong = [
        field.name
        for field, value in asked.params.ListFields()
        if field.name in ASKED and value != getattr(stored.params, field.name)
    ]
    room = engine.max_context_tokens - turn.output_start.length
    most = min(asked.params.max_tokens, room)
    if asked.params.HasField("max_tokens") and stored.params.max_tokens != most:
        wrong.append("max_tokens")
    for name in ("stop", "stop_token_ids"):
        wanted = list(getattr(asked.params, name))
        if wanted and wanted != list(getattr(stored.params, name)):
            wrong.append(name)
    if asked.params.ignore_eos and not stored.params.ignore_eos:
        wrong.append("ignore_eos")
    return [f"P4: it was stored with another {', '.join(wrong)}"] if wrong else []


def _check_finished(
    heard: TurnHeard,
    finished: pb.TurnFinished,
    turn: Turn,
    output: list[int],
    digests: Digests,
    text: str,
) -> list[str]:
    found: list[str] = []
    start, end = turn.output_start.length, turn.output_end.length
    if STATUS.get(finished.status) is not turn.status:
        found.append(f"I2: told {finished.status}, the ledger says {turn.status}")
    reason = None if turn.result is None else turn.result.reason
    if REASONS.get(finished.reason) is not reason:
        found.append(f"I2: told the reason {finished.reason}, the ledger says {reason}")
    if finished.end.length != end or heard.tokens != output:
        found.append(f"I2: told the end at {finished.end.length} with {len(heard.tokens)} tokens")
    elif finished.end.digest != digests.at(end):
        found.append(f"P1: the digest told at the end, {end}, is not the ledger's")
    usage = (finished.usage.input_tokens, finished.usage.output_tokens)
    if usage != (start, len(output)) or finished.usage.cached_tokens > start:
        found.append(f"I2: told usage {usage} of {(start, len(output))}")
    if heard.text != text:
        found.append(f"P17: told {len(heard.text)} characters of {len(text)}")
    return found
