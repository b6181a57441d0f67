"""Bugs of failure detection, fail-over and moves: P9 to P14."""

from __future__ import annotations

from loadtest.simulation.history import HistoryPlan
from tests.sim.mutants.catalogue.plans import (
    BAD_PAGES,
    CACHE,
    CROWDED,
    EVICTIONS,
    LATE_MOVES,
    LUA,
    MOVES,
    OPENING,
    OTHER_TOKENS,
    OTHER_WEIGHTS,
    PLACEMENT,
    SILENCES,
)
from tests.sim.mutants.mutant import Edit, Mutant

FAILOVER = (
    Mutant(
        "nobody has amnesty after the store was away",
        "P9",
        (Edit("gateway/core/liveness.py", "        elif outage:\n", "        elif False:\n"),),
        HistoryPlan(kinds=("store_outage",)),
    ),
    Mutant(
        "a session is taken at once on any break",
        "P10",
        (Edit("gateway/core/failover.py", "    if owner.stale:\n", "    if owner.state:\n"),),
        SILENCES,
        60,
    ),
    Mutant(
        "a turn that kills its replicas never ends",
        "P10",
        (
            Edit(
                f"{LUA}/resume.lua",
                "if stalled >= tonumber(ARGV[5]) then",
                "if false then",
            ),
        ),
        HistoryPlan(kinds=("poison",)),
    ),
    Mutant(
        "a draining replica gets new sessions",
        "P11",
        (
            Edit(
                PLACEMENT,
                "    if replica.state is not ReplicaState.READY:\n",
                "    if replica.state not in (ReplicaState.READY, ReplicaState.DRAINING):\n",
            ),
        ),
        HistoryPlan(kinds=("drain", "kill_replica")),
    ),
    Mutant(
        "ownership is switched before anything is verified",
        "P12",
        (
            Edit(
                "gateway/core/migration.py",
                "    if not _lacks_pages(move, move.head):\n",
                "    if move.head.length < move.page_size or not move.active_turn_id:\n",
            ),
        ),
        MOVES,
    ),
    Mutant(
        "a switch does not compare the active turn",
        "P12",
        (
            Edit(
                f"{LUA}/switch_migration.lua",
                " or s.active ~= ARGV[6] then return refused(s) end",
                " then return refused(s) end",
            ),
        ),
        HistoryPlan(kinds=("migrate", "cancel_at_switch")),
        30,
    ),
    Mutant(
        "a switch does not compare the ledger's head",
        "P12",
        (
            Edit(
                f"{LUA}/switch_migration.lua",
                "if s.length ~= ARGV[4] or s.digest ~= ARGV[5] then return mismatch(s) end\n",
                "",
            ),
        ),
        LATE_MOVES,
        20,
    ),
    Mutant(
        "a move keeps the epoch",
        "P12",
        (
            Edit(
                f"{LUA}/switch_migration.lua",
                "grant(s, v[2], v[3], ARGV[7])",
                "set_owner(s, v[2], v[3])",
            ),
        ),
        MOVES,
    ),
    Mutant(
        "a refused reservation keeps the pages that there were",
        "P12",
        (
            Edit(
                CACHE,
                "        except PagesExhausted:\n            self.release(held)\n",
                "        except PagesExhausted:\n            self._take(self.free_pages)\n",
            ),
        ),
        CROWDED,
    ),
    Mutant(
        "a pin is released twice",
        "P12",
        (
            Edit(
                CACHE,
                "        pin = self._pins.pop(pin_id, None)\n",
                "        pin = self._pins.get(pin_id)\n",
            ),
        ),
        MOVES,
    ),
    Mutant(
        "pages are used whatever their checksum",
        "P13",
        (
            Edit(
                "workers/kv/pages.py",
                "            if checksum(raw) != meta.checksum:\n",
                "            if not raw:\n",
            ),
        ),
        BAD_PAGES,
    ),
    Mutant(
        "an export does not hold its pages",
        "P13",
        (
            Edit(
                "workers/kv/pages.py",
                "        self._run, self.held = cache.acquire_part(block_hashes)\n",
                "        self._run, self.held = cache.match(block_hashes), []\n",
            ),
        ),
        EVICTIONS,
        20,
    ),
    Mutant(
        "KV of another model is used",
        "P14",
        (
            Edit(
                PLACEMENT,
                "        if replica.details.kv_fingerprint != target.details.kv_fingerprint:\n",
                "        if not replica.details.kv_fingerprint:\n",
            ),
            Edit(
                "workers/kv/transfer.py",
                "        if request.kv_fingerprint != info.kv_fingerprint:\n",
                "        if not request.kv_fingerprint:\n",
            ),
            Edit(
                "workers/kv/blocks.py",
                "        kv_fingerprint + namespace,",
                "        namespace,",
            ),
        ),
        OTHER_WEIGHTS,
    ),
    Mutant(
        "a session goes only where its KV can go",
        "P14",
        (
            Edit(
                PLACEMENT,
                "        why = unfit(replica, request) or _taken(replica, request)\n",
                "        kinds = {h.details.kv_fingerprint for it in request.holders\n"
                "                 if (h := fleet.named(it.ref.replica_id)) is not None}\n"
                "        foreign = kinds and replica.details.kv_fingerprint not in kinds\n"
                '        why = "has other pages" if foreign else unfit(replica, request)\n'
                "        why = why or _taken(replica, request)\n",
            ),
        ),
        OTHER_WEIGHTS,
    ),
    Mutant(
        "a session goes to a replica with another tokenizer",
        "P14",
        (
            Edit(
                PLACEMENT,
                "    if request.token_fingerprint and details.token_fingerprint"
                " != request.token_fingerprint:\n",
                "    if request.token_fingerprint and not details.token_fingerprint:\n",
            ),
            Edit(
                OPENING,
                "        if needed and needed != self._ports.codec.token_fingerprint:\n",
                "        if needed is None:\n",
            ),
            Edit(
                f"{LUA}/begin.lua",
                "if fingerprint ~= '' and fingerprint ~= ARGV[12] then return refused(s) end\n",
                "",
            ),
        ),
        OTHER_TOKENS,
    ),
)
