"""What a client asks for, checked and resolved before anything is written.

A turn is stored with every parameter resolved (seed, limits), so that another replica continues it
without the client and without this replica's defaults (P4).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from sessile.v1 import session_pb2, types_pb2

from gateway.app.request_checks import (
    check_params,
    check_priority,
    check_roles,
    check_tools,
)
from gateway.core.errors import ContextTooLong, InvalidRequest
from statestore.digest import DIGEST_BYTES
from statestore.ports import StoreCorrupt
from statestore.records import TurnSpec
from workers.engines.port import BATCH, INTERACTIVE, EngineInfo, Sampling
from workers.text.port import Call, ChatMessage, Folder, Role, TextCodec, Tool
from workers.turn.output import FinishRules

MAX_MESSAGES = 1024
MAX_INPUT_BYTES = 4 << 20
MAX_ID_CHARS = 128
DEFAULT_MAX_TOKENS = 1024
DEFAULT_TIMEOUT_MS = 600_000
MAX_TIMEOUT_MS = 86_400_000

_ROLES = {
    types_pb2.Message.ROLE_SYSTEM: Role.SYSTEM,
    types_pb2.Message.ROLE_USER: Role.USER,
    types_pb2.Message.ROLE_ASSISTANT: Role.ASSISTANT,
    types_pb2.Message.ROLE_TOOL: Role.TOOL,
}


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """A stored turn's body, in the terms of the engine and the codec."""

    sampling: Sampling
    rules: FinishRules
    stop: tuple[str, ...]
    priority: int
    """Of its generations."""

    def folder(self, codec: TextCodec) -> Callable[[], Folder]:
        return lambda: codec.folder(self.stop, self.rules.min_tokens)


def check_ids(session_id: str, turn_id: str) -> None:
    """Raises InvalidRequest for empty or over-long ids."""
    for what, value in (("session_id", session_id), ("turn_id", turn_id)):
        if not 1 <= len(value) <= MAX_ID_CHARS:
            raise InvalidRequest(f"{what} must have 1 to {MAX_ID_CHARS} characters")


def check_turn(turn: types_pb2.RunTurnRequest) -> None:
    """Raises InvalidRequest for input that no state of the session could make valid."""
    if len(turn.messages) > MAX_MESSAGES:
        raise InvalidRequest(f"a turn takes at most {MAX_MESSAGES} messages")
    if sum(message.ByteSize() for message in turn.messages) > MAX_INPUT_BYTES:
        raise InvalidRequest(f"a turn's messages may have at most {MAX_INPUT_BYTES} bytes")
    if turn.timeout_ms > MAX_TIMEOUT_MS:
        raise InvalidRequest(f"timeout_ms may be at most {MAX_TIMEOUT_MS}")
    check_priority(turn.priority)
    check_params(turn.params)


def input_digest(salt: bytes, turn: types_pb2.RunTurnRequest) -> bytes:
    """Digest of what the client asked for, as it was sent: tells a repeat from another request."""
    canonical = types_pb2.RunTurnRequest(messages=turn.messages, params=turn.params)
    data = canonical.SerializeToString(deterministic=True)
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=salt, person=b"turn-input").digest()


def merged_params(
    turn: types_pb2.SamplingParams, session: types_pb2.SamplingParams
) -> types_pb2.SamplingParams:
    """The turn's parameters over the session's defaults. A list that the turn sets replaces the
    session's; it is not joined to it."""
    merged = types_pb2.SamplingParams()
    merged.CopyFrom(session)
    if turn.stop:
        del merged.stop[:]
    if turn.stop_token_ids:
        del merged.stop_token_ids[:]
    merged.MergeFrom(turn)
    return merged


def fork_seed(inherited: int, session_id: str) -> int:
    """A fork's own default seed, below 2^63: with its parent's it would draw the same noise at the
    same positions (P20)."""
    key = inherited.to_bytes(8, "little")
    digest = hashlib.blake2b(session_id.encode(), digest_size=8, key=key, person=b"fork-seed")
    return int.from_bytes(digest.digest(), "little") >> 1


def resolve(
    turn: types_pb2.RunTurnRequest,
    defaults: types_pb2.SamplingParams,
    *,
    salt: bytes,
    output_start: int,
    info: EngineInfo,
    seed: int,
    fork: bool,
    traceparent: str = "",
) -> TurnSpec:
    """The spec to store. ``output_start`` is the ledger's length after the turn's input; ``seed``
    is used if the client gave none; of a ``fork`` the session's default seed is an inherited one.
    Raises ContextTooLong if no output token fits."""
    room = info.max_context_tokens - output_start
    if room < 1:
        raise ContextTooLong(
            f"the turn's context of {output_start} tokens leaves no room in the model's "
            f"{info.max_context_tokens}",
            metadata={
                "context_tokens": str(output_start),
                "max_context_tokens": str(info.max_context_tokens),
            },
        )
    params = merged_params(turn.params, defaults)
    check_params(params)
    if any(token >= info.vocab_size for token in params.stop_token_ids):
        raise InvalidRequest(f"stop_token_ids must be below {info.vocab_size}")
    wanted = params.max_tokens if params.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    params.max_tokens = min(wanted, room)
    params.min_tokens = min(params.min_tokens, params.max_tokens)
    if not params.HasField("seed"):
        params.seed = seed
    elif fork and not turn.params.HasField("seed"):
        params.seed = fork_seed(params.seed, turn.session_id)
    body = types_pb2.RunTurnRequest(
        session_id=turn.session_id,
        turn_id=turn.turn_id,
        messages=turn.messages,
        params=params,
        priority=turn.priority,
        traceparent=traceparent,
    )
    return TurnSpec(
        turn_id=turn.turn_id,
        input_digest=input_digest(salt, turn),
        body=body.SerializeToString(deterministic=True),
        timeout_ms=turn.timeout_ms or DEFAULT_TIMEOUT_MS,
    )


def body_of(spec: TurnSpec) -> types_pb2.RunTurnRequest:
    """The stored request; raises StoreCorrupt if it cannot be read."""
    try:
        return types_pb2.RunTurnRequest.FromString(spec.body)
    except DecodeError as error:
        raise StoreCorrupt(f"turn {spec.turn_id}: unreadable body") from error


def preamble_of(preamble: bytes) -> session_pb2.OpenSessionRequest:
    """The stored leading messages, tools and defaults; raises StoreCorrupt."""
    try:
        return session_pb2.OpenSessionRequest.FromString(preamble)
    except DecodeError as error:
        raise StoreCorrupt("unreadable session preamble") from error


def plan_of(
    body: types_pb2.RunTurnRequest,
    *,
    output_start: int,
    journalled: int = 0,
    info: EngineInfo,
    eos: Sequence[int],
) -> TurnPlan:
    """What a stored turn means for this replica's engine, ``journalled`` output tokens into it.

    ``max_tokens`` is bounded again, because this context may be smaller than that of the replica
    which accepted the turn; but what is in the ledger stays."""
    params = body.params
    room = max(1, info.max_context_tokens - output_start)
    stops = frozenset(params.stop_token_ids)
    return TurnPlan(
        sampling=Sampling(
            temperature=params.temperature,
            top_p=params.top_p if params.HasField("top_p") else 1.0,
            top_k=params.top_k,
            seed=params.seed,
        ),
        rules=FinishRules(
            max_tokens=max(journalled, min(params.max_tokens, room)),
            min_tokens=params.min_tokens,
            stop_token_ids=stops if params.ignore_eos else stops | frozenset(eos),
        ),
        stop=tuple(params.stop),
        priority=BATCH if body.priority == types_pb2.TURN_PRIORITY_BATCH else INTERACTIVE,
    )


def chat_messages(messages: Sequence[types_pb2.Message]) -> list[ChatMessage]:
    """Wire to codec; raises InvalidRequest for a message without a role."""
    check_roles(messages)
    return [
        ChatMessage(
            _ROLES[message.role],
            message.content,
            tuple(Call(c.id, c.name, c.arguments_json) for c in message.tool_calls),
            message.tool_call_id,
            message.name,
        )
        for message in messages
    ]


def chat_tools(tools: Sequence[types_pb2.ToolDefinition]) -> list[Tool]:
    """Wire to codec; raises InvalidRequest for parameters that are not a JSON object."""
    check_tools(tools)
    return [Tool(tool.name, tool.description, tool.parameters_json or "{}") for tool in tools]
