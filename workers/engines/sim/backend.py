"""Makes the sim engine and its codec from text options."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from workers.engines.registry import Backend, parse_options
from workers.engines.sim.config import SimConfig
from workers.engines.sim.engine import SimEngine
from workers.text.bytes_codec import BytesCodec


def create_backend(options: Mapping[str, str], clock: Callable[[], float]) -> Backend:
    """Options are the fields of SimConfig and SimTiming."""
    return Backend(SimEngine(parse_options(SimConfig, options), clock), BytesCodec())
