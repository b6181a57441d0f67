"""``sessile top``: the fleet and a tenant's sessions in a terminal, as they are now."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text
from sessile import Replica, SessionInfo, SessionState

from gateway.cli.fleet import replica_table
from gateway.cli.output import (
    DEFAULT_GATEWAY,
    GatewayOption,
    JsonOption,
    TenantOption,
    client_of,
    console,
    instant,
    print_json,
    table_of,
)

MAX_SESSIONS = 1000
"""Read for each picture at most; the newest ones."""


class Order(enum.StrEnum):
    """Of the sessions; the largest first."""

    UPDATED = "updated"
    TOKENS = "tokens"
    TURNS = "turns"
    BUSY = "busy"


_KEYS: dict[Order, Callable[[SessionInfo], Any]] = {
    Order.UPDATED: lambda info: info.updated_at_ms,
    Order.TOKENS: lambda info: info.head.length,
    Order.TURNS: lambda info: info.turn_index,
    Order.BUSY: lambda info: (bool(info.active_turn_id), info.updated_at_ms),
}


def top(
    once: Annotated[bool, typer.Option("--once", help="One picture, for scripts.")] = False,
    order: Annotated[Order, typer.Option("--sort", help="Of sessions.")] = Order.BUSY,
    limit: Annotated[int, typer.Option(min=0, max=MAX_SESSIONS, help="Sessions shown.")] = 20,
    interval: Annotated[float, typer.Option(min=0.2, max=60, help="Seconds.")] = 1.0,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006 - typer copies it
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Watch replicas (state, load, KV, tokens per second) and sessions until Ctrl-C."""
    with client_of(gateway, tenant) as client:

        def sessions() -> list[SessionInfo]:
            states = [SessionState.OPEN, SessionState.SUSPENDED]
            return ordered(list(client.list(states=states, limit=MAX_SESSIONS)), order)[:limit]

        if once:
            replicas = client.fleet.replicas(include_down=True)
            shown = sessions()
            if as_json:
                print_json({"replicas": replicas, "sessions": shown})
            else:
                console().print(picture(replicas, shown))
            return
        with Live(console=console(), auto_refresh=False, screen=True) as live:
            for replicas in client.fleet.watch(interval_s=interval):
                live.update(picture(replicas, sessions()), refresh=True)


def ordered(sessions: Sequence[SessionInfo], order: Order) -> list[SessionInfo]:
    """The largest first; ties by id, so that rows do not jump."""
    by_id = sorted(sessions, key=lambda info: info.session_id)
    return sorted(by_id, key=_KEYS[order], reverse=True)


def picture(replicas: Sequence[Replica], sessions: Sequence[SessionInfo]) -> Group:
    """What is shown of a fleet: a line of sums, its replicas, the sessions."""
    running = sum(replica.load.running_turns for replica in replicas)
    queued = sum(replica.load.queued_turns for replica in replicas)
    rate = sum(replica.load.decode_tokens_per_s for replica in replicas)
    sums = f"{len(replicas)} replicas, {running} turns run, {queued} wait, {rate:.0f} tok/s"
    rows = [
        (
            info.session_id,
            "busy" if info.active_turn_id else info.state,
            info.owner or "-",
            f"→ {info.migrating_to}" if info.migrating_to else "",
            info.turn_index,
            info.head.length,
            instant(info.updated_at_ms),
        )
        for info in sessions
    ]
    columns = ("session", "state", "replica", "moves", "turns>", "tokens>", "updated")
    return Group(Text(sums, style="bold"), replica_table(replicas), "", table_of(columns, rows))
