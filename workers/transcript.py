"""What was said, from the ledger: any replica with the session's token fingerprint can tell."""

from __future__ import annotations

from sessile.v1 import session_pb2 as pb
from sessile.v1 import types_pb2

from gateway.core.errors import NotFound, NotOwner, Unavailable
from statestore.digest import RollingDigest
from statestore.records import Session, Turn
from workers.turn.cursor import REASON, STATUS, usage_of
from workers.turn.opening import fold
from workers.turn.output import TurnOutput
from workers.turn.ports import TurnPorts
from workers.turn.request import body_of, preamble_of

DEFAULT_TURNS = 100
MAX_TURNS = 1000
MAX_RESPONSE_BYTES = 2 << 20
"""A response stops after the turn that passes this; the rest follows with the next call."""


async def read_transcript(
    ports: TurnPorts, session: Session, request: pb.GetTranscriptRequest
) -> pb.GetTranscriptResponse:
    """Turns in order, from ``request.from_turn_index``. The session itself is left to the caller.

    Raises NotOwner if this replica's codec is not the session's, and what the store raises.
    """
    fingerprint = ports.codec.token_fingerprint
    if session.token_fingerprint and session.token_fingerprint != fingerprint:
        raise NotOwner(
            f"session {session.session_id} needs another tokenizer or template",
            hint="Ask a replica with the session's token fingerprint.",
        )
    count = min(request.max_turns or DEFAULT_TURNS, MAX_TURNS)
    first = request.from_turn_index
    turns = await ports.store.get_turns(session, first, count)
    response = pb.GetTranscriptResponse()
    for turn in turns:
        tokens = await _tokens(ports, session, turn)
        response.turns.append(
            _transcript_turn(ports, session, turn, tokens, request.include_token_ids)
        )
        if response.ByteSize() > MAX_RESPONSE_BYTES:
            break
    following = first + len(response.turns)
    existing = session.turn_index + (session.active_turn_id is not None)
    if response.turns and following < existing:
        response.next_turn_index = following
    return response


async def _tokens(ports: TurnPorts, session: Session, turn: Turn) -> list[int]:
    tokens = await ports.store.read_tokens(session, turn.input_start, turn.output_end.length)
    if len(tokens) != turn.output_end.length - turn.input_start:
        if await ports.store.get_session(session.session_id) is None:
            raise NotFound(f"session {session.session_id} is gone", reason="SESSION_NOT_FOUND")
        raise Unavailable(f"session {session.session_id}: the ledger changed while it was read")
    return tokens


def _transcript_turn(
    ports: TurnPorts, session: Session, turn: Turn, tokens: list[int], include_tokens: bool
) -> pb.TranscriptTurn:
    output_tokens = tokens[turn.output_start.length - turn.input_start :]
    # Digests play no part in a transcript, so the fold may start from an empty ledger's.
    output: TurnOutput = fold(ports, turn, RollingDigest(b"-"), output_tokens)
    if turn.status.ended:
        output.end()
    messages: list[types_pb2.Message] = list(body_of(turn.spec).messages)
    if turn.index == 0:
        messages = [*preamble_of(session.preamble).messages, *messages]
    entry = pb.TranscriptTurn(
        turn_id=turn.spec.turn_id,
        turn_index=turn.index,
        status=STATUS[turn.status],
        input=messages,
        output_text=output.text,
        usage=types_pb2.Usage(
            input_tokens=turn.output_start.length, output_tokens=len(output_tokens)
        ),
        input_start=turn.input_start,
        output_start=turn.output_start.length,
        output_end=turn.output_end.length,
        token_ids=tokens if include_tokens else (),
        attempts=turn.attempt,
    )
    if turn.result is not None:
        entry.reason = REASON[turn.result.reason]
        entry.error = turn.result.error
        if turn.result.usage:
            entry.usage.CopyFrom(usage_of(turn, output))
        if entry.reason == types_pb2.FINISH_REASON_TOOL_CALLS:
            for call in ports.codec.parse_tool_calls(output.text, turn.spec.turn_id):
                entry.tool_calls.add(id=call.id, name=call.name, arguments_json=call.arguments)
    return entry
