"""The histories in which mutants are hunted, and the files that several of them edit."""

from __future__ import annotations

from loadtest.simulation.history import HistoryPlan

ANY = HistoryPlan()
CALM = HistoryPlan(kinds=("kill_gateway",))
KILLS = HistoryPlan(kinds=("kill_replica",))
ZOMBIES = HistoryPlan(kinds=("freeze_replica",))
FLAKY = HistoryPlan(kinds=("flaky_store",))
OUTAGES = HistoryPlan(kinds=("store_outage", "kill_replica"))
LOSSES = HistoryPlan(kinds=("lose_writes",))
CANCELS_AND_LOSSES = HistoryPlan(agents=6, turns=8, storm_s=12.0, kinds=("lose_writes",))
BROKEN_OFF = HistoryPlan(agents=6, kinds=("lose_writes",))
LOSSES_AND_MOVES = HistoryPlan(
    kinds=("lose_writes", "kill_replica", "freeze_replica", "migrate", "kill_gateway")
)
MOVES = HistoryPlan(kinds=("migrate", "drain"))
BAD_PAGES = HistoryPlan(kinds=("corrupt_pages", "migrate", "drain"))
SILENCES = HistoryPlan(storm_s=12.0, kinds=("half_open", "slow_engine"))
SLOW = HistoryPlan(kinds=("slow_network",))
CROWDED = HistoryPlan(
    replicas=2, agents=10, turns=3, kinds=("migrate", "slow_network"), capacity_pages=160
)
CROWD = HistoryPlan(replicas=1, agents=4, kinds=("slow_network",))
EVICTIONS = HistoryPlan(
    replicas=2,
    agents=6,
    turns=3,
    storm_s=8.0,
    kinds=("migrate", "slow_network", "evict"),
    tight=False,
    mixed="",
)
LATE_MOVES = HistoryPlan(
    agents=6, turns=6, storm_s=12.0, kinds=("migrate", "late_switch"), capacity_pages=2048
)
CUT_OFF = HistoryPlan(agents=8, turns=8, storm_s=12.0, kinds=("cut", "cut_from_store", "half_open"))
PURGED = HistoryPlan(agents=32, turns=1, storm_s=3.0, kinds=("duplicates",))
LEFT_ALONE = HistoryPlan(agents=24, turns=4, kinds=("kill_replica",))
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
