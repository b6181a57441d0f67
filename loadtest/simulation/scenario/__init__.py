"""Scenario scripts: text files of commands to a simulated Sessile, each with what was seen.

The format is that of cockroachdb's ``datadriven`` tests: commands, a line ``----``, and what
clients heard and the store held until the last of them was done, up to a blank line. Lines that
begin with ``#`` explain. :func:`play` runs a script in a deterministic world (no random faults,
constant delays) and returns what was seen; whether it is as written is the caller's business.

Nothing unstable is shown: epochs are counted per session, incarnations of a replica are primed
(``r1``, ``r1'``), ids are the script's names. A script that breaks an invariant fails, whatever it
says: the witness and the checks of the random histories watch it too.

Commands (``&`` at the end: in the background, until ``join``; ``via g2``: through that gateway):

    fleet r1 r2 gateways g1 g2 [times.progress_s=1] [turn.detach_grace_s=2] [engine.page_size=16]
    start r1 [engine.page_size=16]            kill|freeze|thaw r1           drain r1 [shutdown]
    open s [on r1] [tenant=t] [leading=300]   fork s as f [at 1]            close s [purge]
    suspend|unsuspend s                       get s [tenant=t]
    migrate s to r2 [recompute]               cancel s t1
    turn s t1 [max_tokens=30] [slow=0.2] [after=t0] [timeout=5] [stop=text] [say=text] [eos]
    again|attach t1 as x                      resume t1                     disconnect t1
    until t1 10 tokens|accepted|moved|waiting|ends                          wait 2, join
    store down|up                             lose 3 writes|reply of append|request of append
    cut r1 g1|store, heal                     corrupt pages|nothing         show s|r1|t1
"""

from loadtest.simulation.scenario.player import play
from loadtest.simulation.scenario.script import BadScript, Block, parse, render

__all__ = ["BadScript", "Block", "parse", "play", "render"]
