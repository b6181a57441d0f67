"""What simulated clients ask for: short prompts, and every kind of end that an output can have."""

from __future__ import annotations

import random

from sessile.v1 import types_pb2 as pb

WORDS = ("look", "at", "this", "and", "that", "é€")
LENGTHS = (1, 20, 40, 80, 120)
LONG_TOKENS = 80
BRIEF_TOKENS = 10
STOPS = ("a", "qu", "the")


def draw_request(
    draw: random.Random, session_id: str, turn_id: str, *, brief: bool
) -> pb.RunTurnRequest:
    """A turn's messages and parameters. ``brief``: it is to be a short one."""
    words = draw.choices(WORDS, k=draw.randrange(1, 30))
    params = pb.SamplingParams(
        max_tokens=BRIEF_TOKENS if brief else draw.choice(LENGTHS),
        temperature=draw.choice([0.0, 1.0]),
    )
    if draw.random() < 0.5:
        params.seed = draw.randrange(1 << 40)
    if draw.random() < 0.2:
        params.stop.append(draw.choice(STOPS))
    if draw.random() < 0.1:
        params.ignore_eos = True
    return pb.RunTurnRequest(
        session_id=session_id,
        turn_id=turn_id,
        messages=[pb.Message(role=pb.Message.ROLE_USER, content=" ".join(words))],
        params=params,
    )


def is_long(request: pb.RunTurnRequest) -> bool:
    """Whether there is time for its client to stop reading in the middle of it."""
    return request.params.max_tokens >= LONG_TOKENS
