"""Bugs of the ledger, of epochs and of the store: P1 to P8."""

from __future__ import annotations

from loadtest.simulation.history import HistoryPlan
from tests.sim.mutants.catalogue.plans import (
    BROKEN_OFF,
    CALM,
    CANCELS_AND_LOSSES,
    CROWD,
    FLAKY,
    KILLS,
    LEFT_ALONE,
    LOSSES,
    LOSSES_AND_MOVES,
    LUA,
    OPENING,
    RUN,
    ZOMBIES,
)
from tests.sim.mutants.mutant import Edit, Mutant

STORE = (
    Mutant(
        "a lost write passes for a repeat of one that was applied",
        "P1",
        (
            Edit(
                f"{LUA}/append.lua",
                "elseif s.length ~= ARGV[6] or s.digest ~= ARGV[7] then",
                "elseif false then",
            ),
        ),
        LOSSES,
    ),
    Mutant(
        "the owner does not write again what the store lost",
        "P1",
        (
            Edit(
                RUN,
                "                return await self._repair(opened)\n",
                '                return Broken(Unavailable("the store is elsewhere"))\n',
            ),
            Edit(
                "workers/turn/repair.py",
                "    if session.epoch > resident.epoch:\n",
                "    if session.epoch:\n",
            ),
        ),
        LOSSES,
    ),
    Mutant(
        "an owner at rest puts nothing back unasked",
        "P1",
        (
            Edit(
                "workers/turn/runs.py",
                "                    await self._put_back(session, resident)\n",
                "                    pass\n",
            ),
        ),
        CANCELS_AND_LOSSES,
        seeds=20,
    ),
    Mutant(
        "a session is suspended and closed without asking its owner what was lost",
        "P1",
        (
            Edit(
                "gateway/app/sessions.py",
                "        limit_s = self._config.times.settle_s\n",
                "        return await self._directory.read(tenant, session_id)\n",
            ),
        ),
        CANCELS_AND_LOSSES,
        seeds=40,
    ),
    Mutant(
        "a turn that was cancelled short of lost tokens stays so",
        "P1",
        (
            Edit(
                f"{LUA}/repair.lua",
                "    if not cut_short(t, stored) then return {'ended', turn(s, t.id)} end\n",
                "    if true then return {'ended', turn(s, t.id)} end\n",
            ),
        ),
        CANCELS_AND_LOSSES,
        40,
    ),
    Mutant(
        "a turn that broke off is not put back by its owner",
        "P1",
        (
            Edit(
                "workers/turn/repair.py",
                "    if turn is None or turn.index != resident.turn_index:\n",
                "    if turn is None or turn.index == resident.turn_index:\n",
            ),
        ),
        BROKEN_OFF,
        seeds=60,
    ),
    Mutant(
        "a client that knows of other tokens is spliced to the ledger's",
        "P1",
        (
            Edit(
                OPENING,
                "    if head.digest and head.digest != session.head.digest:\n",
                "    if head.digest and session.head.length < head.length:\n",
            ),
            Edit(
                OPENING,
                "    if resume_from.digest and resume_from.digest != output.digest_at(count):\n",
                "    if resume_from.digest and count < 0:\n",
            ),
        ),
        HistoryPlan(kinds=("lose_a_turn",)),
        15,
    ),
    Mutant(
        "an epoch lost by the store is granted again",
        "P2",
        (
            Edit(
                f"{LUA}/prelude.lua",
                "s.epoch = int(math.max(tonumber(s.epoch) + 1, s.us))",
                "s.epoch = int(tonumber(s.epoch) + 1)",
            ),
        ),
        LOSSES_AND_MOVES,
        60,
    ),
    Mutant(
        "a newer epoch does not cut off what it did not write",
        "P2",
        (
            Edit(
                f"{LUA}/repair.lua",
                "truncate(KEYS[2], keep - s.own_base)\n",
                "",
            ),
        ),
        HistoryPlan(kinds=("lose_a_move",)),
        20,
        also=("I1",),
    ),
    Mutant(
        "an append whose reply was lost is applied twice",
        "P3",
        (
            Edit(
                f"{LUA}/append.lua",
                "if s.length == ARGV[4] and s.digest == ARGV[5] then",
                "if true then",
            ),
        ),
        FLAKY,
    ),
    Mutant(
        "the tombstone of a cancelled turn is forgotten",
        "P4",
        (
            Edit(
                f"{LUA}/begin.lua",
                "> s.now then\n  return {'tombstoned'}",
                "< 0 then\n  return {'tombstoned'}",
            ),
        ),
        CALM,
    ),
    Mutant(
        "a cancel is forgotten when the turn is resumed",
        "P4",
        (
            Edit(
                f"{LUA}/resume.lua",
                "if ended(s.turn_status) then return",
                "if s.turn_status == 'COMMITTED' then return",
            ),
            Edit(
                OPENING,
                "        if turn.status.ended:\n            return turn\n",
                "        if turn.result is not None and turn.status == 'COMMITTED':\n"
                "            return turn\n",
            ),
            Edit(
                "workers/turn/runs.py",
                "if kept and stored is not None and stored.status.ended:\n",
                "if kept and stored is not None and stored.status == 'COMMITTED':\n",
            ),
        ),
        ZOMBIES,
        20,
        also=("I7",),
    ),
    Mutant(
        "the store does not obey deadlines",
        "P4",
        (
            Edit(
                f"{LUA}/prelude.lua",
                "if s.active == '' or s.now < s.deadline then",
                "if true then",
            ),
        ),
        HistoryPlan(kinds=("freeze_replica", "skew_clocks")),
        30,
    ),
    Mutant(
        "nobody sweeps",
        "P4",
        (
            Edit(
                "gateway/app/duties.py",
                "        report = await self._store.sweep(batch)\n",
                "        report = await self._store.sweep(0)\n",
            ),
        ),
        LEFT_ALONE,
        20,
    ),
    Mutant(
        "a turn is committed after its last append, not with it",
        "P5",
        (
            Edit(
                RUN,
                "        if commit is None and output.reason is not None:\n",
                "        late = self.released == len(output.tokens)\n"
                "        if commit is None and output.reason is not None and late:\n",
            ),
        ),
        KILLS,
    ),
    Mutant(
        "a resumed turn decodes past its end",
        "P5",
        (
            Edit(
                RUN,
                "        if commit is None and output.reason is not None:\n",
                "        late = self.released == len(output.tokens)\n"
                "        await anyio.sleep(0.25 if output.reason is not None and late else 0)\n"
                "        if commit is None and output.reason is not None and late:\n",
            ),
            Edit(
                OPENING,
                "        if len(output.tokens) != len(tokens) - start:\n",
                "        output.reason = None\n"
                "        if len(output.tokens) != len(tokens) - start:\n",
            ),
            Edit(
                "workers/turn/generation.py",
                "            max_new_tokens=plan.rules.max_tokens - done,\n",
                "            max_new_tokens=max(1, plan.rules.max_tokens - done),\n",
            ),
        ),
        KILLS,
    ),
    Mutant(
        "a parked turn never goes on",
        "P6",
        (
            Edit(
                "workers/turn/generation.py",
                "            self._ports.engine.unpark(self._id)\n",
                "",
            ),
        ),
        HistoryPlan(kinds=("store_outage",)),
        30,
    ),
    Mutant(
        "a turn that waits for the store parks all others",
        "P6",
        (
            Edit(
                "workers/engines/scheduling.py",
                "            generation.parked = parked\n",
                "            for other in self._by_id.values() if parked else [generation]:\n"
                "                other.parked = parked\n",
            ),
        ),
        CROWD,
        30,
    ),
    Mutant(
        "a fork reads on past its point",
        "P7",
        (
            Edit(
                "statestore/journal.py",
                "        last = min(end, limit)\n",
                "        last = min(end, limit) if ledger_id == session.session_id else end\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "a purge takes what forks refer to",
        "P7",
        (
            Edit(
                f"{LUA}/purge.lua",
                "if call('HINCRBY', KEYS[3], 'n:' .. id, -1) > 0 then",
                "if false then",
            ),
        ),
        CALM,
        60,
    ),
    Mutant(
        "a store that may evict is accepted",
        "P8",
        (Edit("statestore/redis_failures.py", 'if policy != "noeviction":', "if not policy:"),),
        HistoryPlan(kinds=("evicting_store", "kill_gateway")),
    ),
)
