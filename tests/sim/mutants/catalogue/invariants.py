"""Bugs that break an invariant and no single rule: I1 to I10."""

from __future__ import annotations

from loadtest.simulation.history import HistoryPlan
from tests.sim.mutants.catalogue.plans import (
    CALM,
    CURSOR,
    CUT_OFF,
    DIRECTORY,
    KILLS,
    LUA,
    MOVES,
    OPENING,
    OUTAGES,
    PURGED,
    RUN,
    SLOW,
    TURNS,
    ZOMBIES,
)
from tests.sim.mutants.mutant import Edit, Mutant

INVARIANTS = (
    Mutant(
        "a stale owner may append",
        "I1",
        (
            Edit(
                f"{LUA}/append.lua",
                "if s.epoch ~= ARGV[1] or s.nonce ~= ARGV[2] then",
                "if false then",
            ),
        ),
        ZOMBIES,
    ),
    Mutant(
        "epochs stand still",
        "I1",
        (
            Edit(
                f"{LUA}/take.lua",
                "grant(s, ARGV[3], ARGV[4], ARGV[5])",
                "set_owner(s, ARGV[3], ARGV[4])",
            ),
        ),
        KILLS,
    ),
    Mutant(
        "a new incarnation inherits the sessions of the old one",
        "I1",
        (
            Edit(
                "gateway/core/fleet.py",
                "        return replica if replica is not None and replica.ref == ref else None\n",
                "        return replica\n",
            ),
            Edit(
                "workers/service.py",
                "        if ref_of(request.replica) != self._ports.ref:\n",
                "        if request.replica.replica_id != self._ports.ref.replica_id:\n",
            ),
            Edit(
                OPENING,
                "        if owner is None or owner.replica != self._ports.ref or owner.epoch"
                " != self._epoch:\n",
                "        if owner is None or owner.epoch != self._epoch:\n",
            ),
        ),
        KILLS,
    ),
    Mutant(
        "tokens are delivered before they are journalled",
        "I2",
        (
            Edit(
                CURSOR,
                "        event = view.output.event(sent, view.released)\n",
                "        view.output.seal()\n"
                "        event = view.output.event(sent, len(view.output.tokens))\n",
            ),
        ),
        OUTAGES,
    ),
    Mutant(
        "a moved stream starts over",
        "I2",
        (
            Edit(
                "gateway/app/turns.py",
                "        position = self._cursor.position()\n        if position is not None:\n",
                "        position = None\n        if position is not None:\n",
            ),
        ),
        KILLS,
    ),
    Mutant(
        "a resumed stream begins one token early",
        "I2",
        (
            Edit(
                OPENING,
                '        raise DataLoss(f"the ledger up to {resume_from.length} is not what the'
                ' client was sent")\n    return count\n',
                '        raise DataLoss(f"the ledger up to {resume_from.length} is not what the'
                ' client was sent")\n    return max(count - 1, 0)\n',
            ),
        ),
        CALM,
    ),
    Mutant(
        "a resumed turn goes on from a context without its last token but one",
        "I2",
        (
            Edit(
                "workers/turn/generation.py",
                "            tokens=opened.resident.tokens[:],\n",
                "            tokens=opened.resident.tokens[:] if turn.attempt == 1 else\n"
                "            opened.resident.tokens[:-2] + opened.resident.tokens[-1:],\n",
            ),
        ),
        KILLS,
    ),
    Mutant(
        "a resumed turn draws another seed",
        "I2",
        (
            Edit(
                OPENING,
                "        plan = _plan(self._ports, resumed)\n",
                "        plan = _plan(self._ports, resumed)\n"
                "        from dataclasses import replace\n"
                "        sampling = replace(plan.sampling, seed=plan.sampling.seed + 1)\n"
                "        plan = replace(plan, sampling=sampling)\n",
            ),
        ),
        KILLS,
    ),
    Mutant(
        "a session runs two turns at once",
        "I3",
        (
            Edit(
                f"{LUA}/begin.lua",
                "if s.active ~= '' then\n  -- A turn",
                "if false then\n  -- A turn",
            ),
            Edit(
                OPENING,
                "        if session.active_turn_id is not None and known <= session.turn_index:\n",
                "        if session.active_turn_id is not None and known < 0:\n",
            ),
            Edit(
                "workers/turn/runs.py",
                "                if run is None:\n",
                "                if run is None or run.turn_id != turn.turn_id:\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "a turn that has ended can be written to",
        "I3",
        (Edit(f"{LUA}/append.lua", "if ended(s.turn_status) then", "if false then"),),
        SLOW,
        20,
    ),
    Mutant(
        "a fenced run delivers what it has",
        "I4",
        (
            Edit(
                RUN,
                "            case store.Fenced() | store.Missing():\n"
                "                return Broken(refusal(self.session_id, outcome))\n\n"
                "    def _acknowledge",
                "            case store.Fenced() | store.Missing():\n"
                "                self._acknowledge(opened, count, head)\n"
                "                return Broken(refusal(self.session_id, outcome))\n\n"
                "    def _acknowledge",
            ),
            Edit(
                CURSOR,
                "            if isinstance(ending, Broken):\n",
                "            if isinstance(ending, Broken) and sent >= view.released:\n",
            ),
        ),
        CUT_OFF,
        30,
    ),
    Mutant(
        "a suspended session keeps its owner",
        "I4",
        (
            Edit(
                f"{LUA}/suspend.lua",
                "set_owner(s, '', '0')\n",
                "",
            ),
        ),
        CALM,
    ),
    Mutant(
        "pages are named by their own tokens, not by those before",
        "I5",
        (Edit("workers/kv/blocks.py", "        previous + packed_page,", "        packed_page,"),),
        CALM,
    ),
    Mutant(
        "a turn held for a move that failed never goes on",
        "I6",
        (
            Edit(
                "gateway/app/migration.py",
                "        if self._hold_asked:\n",
                "        if self._hold_asked and self._was_running is None:\n",
            ),
            Edit(
                RUN,
                "        hold = _Hold(migration_id, anyio.current_time() + lease_s)\n",
                "        hold = _Hold(migration_id, anyio.current_time() + 1000 * lease_s)\n",
            ),
        ),
        HistoryPlan(kinds=("migrate", "corrupt_pages")),
        60,
        also=("I7",),
    ),
    Mutant(
        "a stale owner is looked for in the placement cache for ever",
        "I7",
        (
            Edit(
                DIRECTORY,
                "            raise unknown_session(session_id)\n        self.remember(session)\n",
                "            raise unknown_session(session_id)\n"
                "        if session_id not in self._known:\n"
                "            self.remember(session)\n",
            ),
            Edit(
                DIRECTORY,
                "        if known is not None and known.owner == owner:\n",
                "        if known is not None and known.owner is None:\n",
            ),
        ),
        MOVES,
    ),
    Mutant(
        "NOT_OWNER is ignored",
        "I7",
        (
            Edit(
                TURNS,
                "                    await self._after_disowned(assignment)\n",
                "                    await self._pause(self._backoff_s())\n",
            ),
        ),
        MOVES,
    ),
    Mutant(
        "a cancelled turn keeps its place",
        "I7",
        (
            Edit(
                RUN,
                "        self._on_end(self)\n",
                "        turn = ending.turn if isinstance(ending, Ended) else None\n"
                "        if turn is None or turn.status != 'CANCELLED':\n"
                "            self._on_end(self)\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "a cancelled stream counts as open for ever",
        "I8",
        (
            Edit(
                "gateway/app/admission.py",
                "        try:\n            yield\n        finally:\n",
                "        yield\n        if self.taken:\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "the load of a broken dispatch is assumed for ever",
        "I8",
        (
            Edit(
                TURNS,
                "            self._s.fleet.release(dispatch.attempt_id)\n",
                "            if cursor.finished:\n"
                "                self._s.fleet.release(dispatch.attempt_id)\n",
            ),
        ),
        KILLS,
    ),
    Mutant(
        "the table of owners has no bound",
        "I8",
        (
            Edit(
                DIRECTORY,
                "        while len(self._known) > self._tables.owners:\n",
                "        while not self._known:\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "a closed session leaves its pages with its owner",
        "I9",
        (
            Edit(
                "workers/engines/cached_pages.py",
                "        return self._cache.drop(block_hashes)\n",
                "        return 0\n",
            ),
        ),
        MOVES,
    ),
    Mutant(
        "a late repeat of its request makes a purged session anew",
        "I9",
        (
            Edit(
                f"{LUA}/purge.lua",
                "call('HSET', KEYS[3], 'gone:' .. id, int(s.now + tonumber(ARGV[1])))",
                "",
            ),
        ),
        PURGED,
        60,
    ),
    Mutant(
        "a foreign session is served from the cache",
        "I10",
        (
            Edit(
                DIRECTORY,
                "        if known is None or known.tenant != tenant:\n",
                "        if known is None:\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "pages are named alike for every tenant",
        "I10",
        (
            Edit(
                "workers/kv/blocks.py",
                "        kv_fingerprint + namespace,",
                "        kv_fingerprint,",
            ),
        ),
        CALM,
    ),
)
