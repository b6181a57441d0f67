"""The deliberate bugs, by the rule that each of them breaks (docs/ARCHITECTURE.md lists the rules).

Edits are textual, so that a mutant is the real code but for the one thing that is wrong with it. An
edit whose code has changed has to be written anew; a test says so at once.
"""

from tests.sim.mutants.catalogue.failover import FAILOVER
from tests.sim.mutants.catalogue.invariants import INVARIANTS
from tests.sim.mutants.catalogue.ledger import STORE
from tests.sim.mutants.catalogue.streams import STREAMS

MUTANTS = (*STORE, *FAILOVER, *STREAMS, *INVARIANTS)
