"""``sessile sessions``: what a tenant's sessions are and what was said in them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from sessile import NotFound, SessionInfo, SessionState, TranscriptTurn

from gateway.cli import complete
from gateway.cli.output import (
    DEFAULT_GATEWAY,
    MAX_COUNT,
    GatewayOption,
    JsonOption,
    TenantOption,
    client_of,
    console,
    instant,
    print_json,
    show,
    table_of,
    tell,
)

app = typer.Typer(no_args_is_help=True, help="List, read, fork and close sessions.")

SessionArgument = Annotated[
    str,
    typer.Argument(metavar="SESSION", help="Id of the session.", autocompletion=complete.sessions),
]
LabelOption = Annotated[
    list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="May be repeated.")
]


def parse_labels(labels: list[str] | None) -> dict[str, str]:
    """``key=value`` pairs; a usage error for anything else."""
    pairs = {}
    for label in labels or ():
        key, equals, value = label.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"a label is KEY=VALUE, not {label!r}")
        pairs[key] = value
    return pairs


@app.command("ls")
def list_sessions(
    label: LabelOption = None,
    closed: Annotated[bool, typer.Option(help="Also closed ones.")] = False,
    limit: Annotated[int, typer.Option(min=1)] = 100,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006 - typer copies it
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """List sessions, newest first."""
    states = [SessionState.OPEN, SessionState.SUSPENDED] + [SessionState.CLOSED] * closed
    with client_of(gateway, tenant) as client:
        found = list(client.list(labels=parse_labels(label), states=states, limit=limit))
    rows = [
        (
            info.session_id,
            info.model,
            info.state + (" (busy)" if info.active_turn_id else ""),
            info.owner or "-",
            info.turn_index,
            info.head.length,
            " ".join(f"{key}={value}" for key, value in sorted(info.labels.items())),
            instant(info.updated_at_ms),
        )
        for info in found
    ]
    columns = ("session", "model", "state", "replica", "turns>", "tokens>", "labels", "updated")
    show(found, table_of(columns, rows), as_json)


@app.command("show")
def show_session(
    session: SessionArgument,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show one session."""
    with client_of(gateway, tenant) as client:
        _show(client.session(session).refresh(), as_json)


@app.command()
def transcript(
    session: SessionArgument,
    from_turn: Annotated[int, typer.Option(min=0, max=MAX_COUNT)] = 0,
    tokens: Annotated[bool, typer.Option(help="Also token ids (with --json).")] = False,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Print what was said."""
    with client_of(gateway, tenant) as client:
        turns = client.session(session).transcript(from_turn=from_turn, token_ids=tokens)
    if as_json:
        print_json(turns)
        return
    for turn in turns:
        _print_turn(turn)


@app.command()
def fork(
    session: SessionArgument,
    at_turn: Annotated[
        int | None, typer.Option(min=0, max=MAX_COUNT, help="Default: the last boundary.")
    ] = None,
    label: LabelOption = None,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make a session that shares this one's history."""
    with client_of(gateway, tenant) as client:
        child = client.session(session).fork(at_turn=at_turn, labels=parse_labels(label))
        assert child.info is not None
        _show(child.info, as_json)


@app.command()
def close(
    sessions: Annotated[
        list[str], typer.Argument(metavar="SESSION...", autocompletion=complete.sessions)
    ],
    purge: Annotated[bool, typer.Option(help="Remove everything at once.")] = False,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """End sessions; a running turn ends cancelled. One that is not there does not stop the rest."""
    unknown = False
    with client_of(gateway, tenant) as client:
        for session in sessions:
            try:
                client.session(session).close(purge=purge)
            except NotFound as error:
                tell(error.message, error.hint)
                unknown = True
                continue
            if as_json:
                print_json({"closed": session})
            else:
                console().print(f"closed {session}", markup=False)
    if unknown:
        raise typer.Exit(1)


def _show(info: SessionInfo, as_json: bool) -> None:
    rows = [
        ("session", info.session_id),
        ("model", info.model),
        ("state", info.state),
        ("replica", info.owner or "-"),
        ("moving to", info.migrating_to or "-"),
        ("active turn", info.active_turn_id or "-"),
        ("turns", info.turn_index),
        ("tokens", info.head.length),
        ("ledger bytes", info.ledger_bytes),
        ("parent", info.parent_id or "-"),
        ("labels", " ".join(f"{k}={v}" for k, v in sorted(info.labels.items())) or "-"),
        ("opened", instant(info.created_at_ms)),
        ("updated", instant(info.updated_at_ms)),
    ]
    show(info, table_of(("", ""), rows), as_json)


def _print_turn(turn: TranscriptTurn) -> None:
    out = console()
    for message in turn.input:
        out.print(f"[bold cyan]{message.role}[/]: {escape(message.content)}")
    out.print(f"[bold green]assistant[/]: {escape(turn.output_text)}")
    for call in turn.tool_calls:
        out.print(f"  calls {escape(call.name)}({escape(call.arguments_json)})")
    detail = f"turn {turn.turn_index} {turn.status} ({turn.finish_reason})"
    usage = turn.usage
    counts = f"{usage.input_tokens} in, {usage.cached_tokens} cached, {usage.output_tokens} out"
    out.print(f"[dim]{detail}; {counts}{escape('; ' + turn.error if turn.error else '')}[/]\n")
