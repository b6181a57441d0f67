"""The deliberate bugs, by the rule that each of them breaks (docs/ARCHITECTURE.md lists the rules).

Edits are textual, so that a mutant is the real code but for the one thing that is wrong with it. An
edit whose code has changed has to be written anew; a test says so at once.
"""

from __future__ import annotations

from dataclasses import replace

from loadtest.simulation.history import HistoryPlan
from tests.sim.mutants.mutant import Edit, Mutant

ANY = HistoryPlan()
CALM = HistoryPlan(kinds=("kill_gateway",))
KILLS = HistoryPlan(kinds=("kill_replica",))
ZOMBIES = HistoryPlan(kinds=("freeze_replica",))
FLAKY = HistoryPlan(kinds=("flaky_store",))
OUTAGES = HistoryPlan(kinds=("store_outage", "kill_replica"))
LOSSES = HistoryPlan(kinds=("lose_writes",))
LOSSES_AND_MOVES = HistoryPlan(
    kinds=("lose_writes", "kill_replica", "freeze_replica", "migrate", "kill_gateway")
)
MOVES = HistoryPlan(kinds=("migrate", "drain"))
BAD_PAGES = HistoryPlan(kinds=("corrupt_pages", "migrate", "drain"))
SILENCES = HistoryPlan(storm_s=12.0, kinds=("half_open", "slow_engine"))
SLOW = HistoryPlan(kinds=("slow_network",))
CROWDED = HistoryPlan(
    replicas=2, agents=10, turns=3, kinds=("migrate", "slow_network"), capacity_pages=128
)
CROWD = HistoryPlan(replicas=1, agents=4, kinds=("slow_network",))
EVICTIONS = replace(CROWDED, kinds=("migrate", "slow_network", "evict"), storm_s=8.0)
LATE_MOVES = HistoryPlan(kinds=("migrate", "late_switch"))
OTHER_WEIGHTS = HistoryPlan(replicas=2, kinds=("kill_replica", "migrate"), mixed="weights")
OTHER_TOKENS = HistoryPlan(kinds=("kill_replica",), mixed="tokens")
UNDISTURBED = HistoryPlan(kinds=("kill_gateway",), schedule=())
TIGHT = HistoryPlan(kinds=("kill_gateway",), schedule=(), tight=True)

LUA = "statestore/lua"
RUN, OPENING = "workers/turn/run.py", "workers/turn/opening.py"
CURSOR, OUTPUT = "workers/turn/cursor.py", "workers/turn/output.py"
CACHE = "workers/kv/prefix_cache.py"
DIRECTORY, TURNS = "gateway/app/directory.py", "gateway/app/turns.py"
PLACEMENT = "gateway/core/placement.py"

MUTANTS = (
    # -- ledger, epochs and the store ----------------------------------------------------------
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
                OPENING,
                "        return session.epoch <= resident.epoch and (\n",
                "        return session.epoch < resident.epoch < session.epoch and (\n",
            ),
        ),
        LOSSES,
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
                "                if stored is not None and stored.status.ended:\n",
                "                if stored is not None and stored.status == 'COMMITTED':\n",
            ),
        ),
        ZOMBIES,
        20,
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
        KILLS,
        30,
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
        (Edit("statestore/redis_executor.py", 'if policy != "noeviction":', "if not policy:"),),
        HistoryPlan(kinds=("evicting_store", "kill_gateway")),
    ),
    # -- failure detection and fail-over -------------------------------------------------------
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
        60,
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
        40,
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
                '        why = unfit(replica, request) or ("every place is taken" if replica.full'
                " else None)\n",
                "        kinds = {h.details.kv_fingerprint for it in request.holders\n"
                "                 if (h := fleet.named(it.ref.replica_id)) is not None}\n"
                "        foreign = kinds and replica.details.kv_fingerprint not in kinds\n"
                '        why = "has other pages" if foreign else unfit(replica, request)\n'
                '        why = why or ("every place is taken" if replica.full else None)\n',
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
    # -- streams -------------------------------------------------------------------------------
    Mutant(
        "a slow client holds up its turn",
        "P15",
        (
            Edit(
                CURSOR,
                "            if message.events:\n                yield message\n",
                "            if message.events:\n"
                "                view.unread = True\n"
                "                yield message\n"
                "                view.unread = False\n",
            ),
            Edit(
                RUN,
                "        now, output = anyio.current_time(), opened.output\n",
                "        while getattr(self, 'unread', False) and self._streams:\n"
                "            await anyio.sleep(0.01)\n"
                "        now, output = anyio.current_time(), opened.output\n",
            ),
        ),
        TIGHT,
        40,
    ),
    Mutant(
        "a slow client loses what it did not read in time",
        "P15",
        (
            Edit(
                CURSOR,
                "        event = view.output.event(sent, view.released)\n",
                "        event = view.output.event(max(sent, view.released - 8), view.released)\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "a relay that joins messages drops the first",
        "P16",
        (Edit("gateway/app/relay.py", 'b"".join(chunks))', 'b"".join(chunks[1:]))'),),
        CALM,
    ),
    Mutant(
        "text offsets begin anew when a stream is resumed",
        "P17",
        (
            Edit(
                CURSOR,
                "            sent = _add_tokens(message, view, sent)\n",
                "            sent = _add_tokens(message, view, sent)\n"
                "            for event in message.events:\n"
                '                if event.HasField("tokens"):\n'
                "                    event.tokens.text_offset -= view.output._ends[first]\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "tokens of a stop string are left out of the ledger",
        "P17",
        (
            Edit(
                OUTPUT,
                "        if self._folder.stopped:\n            return FinishReason.STOP\n",
                "        if self._folder.stopped:\n"
                "            if count > 1:\n"
                "                del self.tokens[-1], self._pieces[-1], self._ends[-1]\n"
                "            return FinishReason.STOP\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "input is rendered without closing the last turn",
        "P18",
        (
            Edit(
                OPENING,
                "            last = LastTurn.CLOSED if closed else LastTurn.OPEN\n",
                "            last = LastTurn.CLOSED if closed else LastTurn.CLOSED\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "leading messages are named alike for every tenant",
        "P19",
        (
            Edit(
                "gateway/app/sessions.py",
                'digest_size=16, key=salt, person=b"leading"',
                'digest_size=16, person=b"leading"',
            ),
        ),
        UNDISTURBED,
    ),
    Mutant(
        "a fork of a running turn has the unfinished turn's tokens",
        "P20",
        (
            Edit(
                f"{LUA}/fork.lua",
                "    length, digest = at[1], at[2]\n",
                "    length, digest = at[1], at[2]\n"
                "    if i == #sources and s.active ~= '' then length, digest = s.length, s.digest"
                " end\n",
            ),
        ),
        CALM,
    ),
    Mutant(
        "forks draw the same seeds as their parent",
        "P20",
        (
            Edit(
                OPENING, "            seed=self._seed,\n", "            seed=session.turn_index,\n"
            ),
        ),
        CALM,
    ),
    # -- invariants ----------------------------------------------------------------------------
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
        HistoryPlan(kinds=("cut", "cut_from_store", "half_open")),
        60,
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
                "workers/engines/paged.py",
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
        HistoryPlan(kinds=("duplicates",)),
        120,
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
