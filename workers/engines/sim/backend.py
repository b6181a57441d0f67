"""Makes the sim engine and its codec from text options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from workers.engines.registry import Backend, parse_options
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.engine import SimEngine
from workers.text.bytes_codec import BytesCodec


def create_backend(options: Mapping[str, str], clock: Callable[[], float]) -> Backend:
    """Options are the fields of SimConfig and SimTiming."""
    names = {field.name for field in dataclasses.fields(SimTiming)}
    timing = {name: text for name, text in options.items() if name in names}
    rest = {name: text for name, text in options.items() if name not in names}
    config = parse_options(SimConfig, rest, timing=parse_options(SimTiming, timing))
    return Backend(SimEngine(config, clock), BytesCodec())
