"""Bugs of streams, text, placement and forks: P15 to P20."""

from __future__ import annotations

from tests.sim.mutants.catalogue.plans import (
    CALM,
    CURSOR,
    LUA,
    OPENING,
    OUTPUT,
    RUN,
    TIGHT,
    UNDISTURBED,
)
from tests.sim.mutants.mutant import Edit, Mutant

STREAMS = (
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
        also=("I7",),
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
        also=("I2",),
    ),
    Mutant(
        "a relay that joins messages drops the first",
        "P16",
        (Edit("gateway/app/relay.py", 'b"".join(chunks))', 'b"".join(chunks[1:]))'),),
        CALM,
        also=("I2",),
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
)
