"""Kinds of faults. Each breaks something and mends it again after a while; what exactly is drawn
from the fault's own seed."""

from loadtest.simulation.faults.losses import LOSSY, LOSSY_SHARE
from loadtest.simulation.faults.storm import FAULTS, Storm

__all__ = ["FAULTS", "LOSSY", "LOSSY_SHARE", "Storm"]
