"""What the replicas of a world really are, whatever they and the gateways say of them."""

from __future__ import annotations

from loadtest.simulation.checkers.stored import Ref
from loadtest.simulation.world import OtherTokens, SimReplica, World
from workers.text.bytes_codec import BytesCodec


def replica_of(world: World, ref: Ref) -> SimReplica | None:
    """The replica that is, or was, this process; None if it never served."""
    return next((it for it in world.serving.values() if world.whose(it.process) == ref), None)


def understands(world: World, name: str, fingerprint: bytes) -> bool:
    """Whether a replica of this name has the tokenizer of a session's tokens (empty: it has none
    yet)."""
    codec = OtherTokens if name in world.other_tokens else BytesCodec
    return fingerprint in (b"", codec.token_fingerprint)


def same_kv(world: World, one: str, other: str) -> bool:
    """Whether one replica's KV is of use to another."""
    return (one in world.other_weights) == (other in world.other_weights)
