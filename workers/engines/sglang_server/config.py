"""Settings of a replica before an sglang server that somebody else runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from statestore.connection import redacted


@dataclass(frozen=True, slots=True)
class SglangServerConfig:
    """Refuses contradictions when it is made (ValueError)."""

    url: str
    """Of the server, for instance ``http://127.0.0.1:30000``."""
    model: str
    """The folder of the server's model: its tokenizer and chat template are read from it."""
    api_key: str = field(default="", repr=False)
    """Of the server (its ``--api-key``)."""
    events: str = ""
    """Where the server publishes KV events (``tcp://host:port``); empty: it is not known what its
    cache holds."""
    replay: str = ""
    """Where it answers for events that were missed."""
    max_running: int = 16
    """Generations that the server is given at once."""
    max_queued: int = 256
    """Generations that wait; over it ``submit`` refuses."""
    max_context_tokens: int | None = None
    """At most this much of what the server allows."""
    timeout_s: float = 10.0
    """For an answer about the server, and for the first byte of a stream's headers."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be like http://host:port, not {redacted(self.url)!r}")
        if "@" in parts.netloc:  # it is in what is said of the server
            raise ValueError("url has no user in it: api_key is what the server asks for")
        for name in ("max_running", "max_queued"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.replay and not self.events:
            raise ValueError("replay is of no use without events")
