"""``sessile replicas`` and ``sessile migrate``: the operator's commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from sessile import DrainProgress, Replica

from gateway.cli import complete
from gateway.cli.output import (
    DEFAULT_GATEWAY,
    MAX_TIMEOUT_S,
    GatewayOption,
    JsonOption,
    client_of,
    console,
    fail,
    print_json,
    show,
    table_of,
)
from gateway.cli.sessions import SessionArgument

app = typer.Typer(no_args_is_help=True, help="See and drain replicas.")

ReplicaArgument = Annotated[
    str,
    typer.Argument(metavar="REPLICA", help="Id of the replica.", autocompletion=complete.replicas),
]
OPERATOR = ""
"""Fleet calls belong to no tenant."""


@app.command("ls")
def list_replicas(
    down: Annotated[bool, typer.Option(help="Also those that are down.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow until Ctrl-C.")] = False,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006 - typer copies it
    as_json: JsonOption = False,
) -> None:
    """List replicas and their load."""
    with client_of(gateway, OPERATOR) as client:
        if not watch:
            replicas = client.fleet.replicas(include_down=down)
            show(replicas, replica_table(replicas), as_json)
        elif as_json:
            for replicas in client.fleet.watch():
                print_json(replicas)
        else:
            with Live(console=console(), auto_refresh=False) as live:
                for replicas in client.fleet.watch():
                    live.update(replica_table(replicas), refresh=True)


@app.command()
def drain(
    replica: ReplicaArgument,
    timeout: Annotated[float, typer.Option(min=1, max=MAX_TIMEOUT_S, help="Seconds.")] = 120.0,
    shutdown: Annotated[bool, typer.Option(help="Its process ends when it is empty.")] = False,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Move every session away from a replica; it takes no new ones."""
    last: DrainProgress | None = None
    with client_of(gateway, OPERATOR) as client:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console(),
            disable=as_json,
        )
        with bar:
            task = bar.add_task(f"draining {replica}", total=None)
            for last in client.fleet.drain(replica, timeout_s=timeout, shutdown=shutdown):
                moved = last.moved_with_kv + last.moved_without_kv
                bar.update(task, completed=moved, total=moved + last.remaining)
                if as_json:
                    print_json(last)
    if last is None or not last.done:
        fail("the drain ended early", "Run it again: it goes on from where it is.")
        return
    if not as_json:
        typer.echo(
            f"{last.moved_with_kv} moved with KV, {last.moved_without_kv} without,"
            f" {last.remaining} left"
        )
    if last.remaining:
        fail("not every session could be moved", "What is left fails over when it is next used.")


@app.command()
def undrain(
    replica: ReplicaArgument,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Undo a drain: the replica takes new sessions again."""
    with client_of(gateway, OPERATOR) as client:
        left = client.fleet.undrain(replica)
    if as_json:
        print_json(left)
    else:
        typer.echo(f"{replica} takes sessions again; {left.remaining} are still there")


def migrate(
    session: SessionArgument,
    target: Annotated[
        str,
        typer.Argument(
            metavar="REPLICA",
            help="Default: the best other replica.",
            autocompletion=complete.replicas,
        ),
    ] = "",
    timeout: Annotated[float, typer.Option(min=1, max=MAX_TIMEOUT_S, help="Seconds.")] = 30.0,
    allow_recompute: Annotated[bool, typer.Option(help="Move without KV if need be.")] = False,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Move a session, with its KV cache, to another replica."""
    with client_of(gateway, OPERATOR) as client:
        result = client.fleet.migrate(
            session, target=target, timeout_s=timeout, allow_recompute=allow_recompute
        )
    if as_json:
        print_json(result)
    elif result.moved:
        size = result.bytes_copied / 1e6
        running = " in mid-turn" if result.running_turn else ""
        typer.echo(
            f"{result.session_id} moved{running} from {result.source} to {result.target}:"
            f" {result.verified_tokens} tokens, {size:.1f} MB,"
            f" {result.rounds} rounds, {result.duration_ms:.0f} ms"
        )
    if not result.moved:
        fail(f"{session} did not move: {result.detail}", "It is where it was and can run.")


def replica_table(replicas: Sequence[Replica]) -> Table:
    """One line a replica."""
    rows = [
        (
            replica.ref,
            replica.state,
            f"{replica.engine}/{replica.model}",
            replica.endpoint,
            replica.load.sessions,
            f"{replica.load.running_turns}/{replica.load.max_running_turns}",
            replica.load.queued_turns,
            f"{replica.capacity_pages - replica.load.free_pages}/{replica.capacity_pages}",
            f"{replica.load.decode_tokens_per_s:.0f}",
        )
        for replica in replicas
    ]
    columns = (
        "replica",
        "state",
        "engine",
        "endpoint",
        "sessions>",
        "turns>",
        "queued>",
        "pages>",
        "tok/s>",
    )
    return table_of(columns, rows)
