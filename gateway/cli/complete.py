"""Ids for the shell's completion, asked of the gateway that the words typed so far and the
environment name. It may only see what the caller may: it asks with the caller's key and tenant.

Whatever goes wrong there are no ids, in time, and not a word: somebody is typing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from sessile import RetryPolicy, SessileError, sync

from gateway.cli.output import DEFAULT_GATEWAY, use_credentials

TIME_LIMIT_S = 1.0
MAX_SESSIONS = 100
"""The newest ones are asked for."""

Completion = tuple[str, str]
"""An id, and what shells that have room show beside it."""


def sessions(ctx: typer.Context, incomplete: str) -> list[Completion]:
    """Open and suspended sessions of the caller's tenant."""

    def ask(client: sync.Sessile) -> Iterator[Completion]:
        for info in client.list(limit=MAX_SESSIONS):
            labels = " ".join(f"{key}={value}" for key, value in sorted(info.labels.items()))
            yield info.session_id, f"{info.state} {info.model} {labels}".rstrip()

    return _asked(ctx, incomplete, ask)


def replicas(ctx: typer.Context, incomplete: str) -> list[Completion]:
    """Replicas that are not down; none for whoever is no operator."""

    def ask(client: sync.Sessile) -> Iterator[Completion]:
        for replica in client.fleet.replicas():
            yield replica.ref.replica_id, f"{replica.state} {replica.engine}/{replica.model}"

    return _asked(ctx, incomplete, ask)


def _asked(
    ctx: typer.Context, incomplete: str, ask: Callable[[sync.Sessile], Iterable[Completion]]
) -> list[Completion]:
    """What begins with ``incomplete`` and is not among the words already."""
    root = ctx.find_root().params
    use_credentials(root.get("api_key") or "", root.get("tls") or "")
    gateways = ctx.params.get("gateway") or [DEFAULT_GATEWAY]
    retry = RetryPolicy(max_attempts=len(gateways), initial_s=0.0)
    before = {word for value in ctx.params.values() for word in _words(value)}
    try:
        with (
            _silence(),
            sync.Sessile(
                gateways,
                tenant=ctx.params.get("tenant") or None,
                retry=retry,
                timeout_s=TIME_LIMIT_S,
            ) as client,
        ):
            return [
                one for one in ask(client) if one[0].startswith(incomplete) and one[0] not in before
            ]
    except (SessileError, OSError):
        return []


def _words(value: Any) -> Iterable[str]:
    return value if isinstance(value, list | tuple) else [str(value)]


@contextmanager
def _silence() -> Iterator[None]:
    """Of the logs, and of gRPC's own words on standard error: they would go into the command line
    that is being typed."""
    disabled, kept = logging.root.manager.disable, os.dup(2)
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        logging.disable(disabled)
