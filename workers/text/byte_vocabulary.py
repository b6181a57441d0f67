"""The vocabulary of the sim engine: the 256 bytes, and a few specials that no text encodes to."""

from __future__ import annotations

BOS = 256
"""Begins a ledger."""
END_OF_TURN = 257
"""Ends a message; generating it ends a turn."""
SYSTEM = 258
USER = 259
ASSISTANT = 260
TOOL = 261
VOCAB_SIZE = 262

PRINTABLE = b"abcdefghijklmnopqrstuvwxyz      etaoinshr"
"""What the sim engine writes, so that its output looks a little like text."""
