"""How commands speak: tables for people, JSON for programs, one line for errors.

Exit codes: 0 done, 1 failed, 2 used wrongly.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from sessile import RetryPolicy, SessileError, Unavailable, sync
from sessile.credentials import API_KEY_VARIABLE, TLS_VARIABLE

PIPED_WIDTH = 200
RETRY = RetryPolicy(max_attempts=6)
"""Somebody waits at a terminal: fewer tries than a program makes."""
DEFAULT_GATEWAY = "127.0.0.1:8470"
NO_GATEWAY = (
    "Start a fleet with `sessile up`, or name a gateway that runs with --gateway. One that speaks"
    " TLS is called with `sessile --tls FILE …`."
)

MAX_COUNT = 2**32 - 1
"""Of tokens and turns."""
MAX_TIMEOUT_S = 86_400

GatewayOption = Annotated[
    list[str],
    typer.Option(
        "--gateway", "-g", envvar="SESSILE_GATEWAY", help="host:port; give several to fail over."
    ),
]
TenantOption = Annotated[
    str,
    typer.Option(
        envvar="SESSILE_TENANT",
        help="The tenant whose sessions these are. Default: that of the API key, else `default`.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def use_credentials(api_key: str, tls: str) -> None:
    """What the root command was given, put where the clients of every command look."""
    for variable, value in ((API_KEY_VARIABLE, api_key), (TLS_VARIABLE, tls)):
        if value:
            os.environ[variable] = value


def console() -> Console:
    """Standard output as it is now (tests replace it). What is not a terminal gets long lines:
    nothing is cut off for ``grep``."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


@contextmanager
def client_of(gateways: Sequence[str], tenant: str) -> Iterator[sync.Sessile]:
    """A client; its errors end the command. Key and TLS are as the environment has them (the root
    command's options are put there)."""
    with reported_errors(), sync.Sessile(gateways, tenant=tenant or None, retry=RETRY) as client:
        yield client


@contextmanager
def reported_errors(*others: type[Exception]) -> Iterator[None]:
    """Turns what can go wrong (the client's errors, the system's, and ``others``) into one line on
    standard error and exit code 1. Bugs keep their traceback."""
    expected: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        cause: Exception = error
        while isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, SessileError):
            unreachable = isinstance(cause, Unavailable) and not cause.hint
            fail(cause.message, NO_GATEWAY if unreachable else cause.hint)
        if isinstance(cause, expected):
            fail(str(cause) or type(cause).__name__)
        raise


def fail(message: str, hint: str = "") -> NoReturn:
    """Ends the command."""
    tell(message, hint)
    raise typer.Exit(1)


def tell(message: str, hint: str = "") -> None:
    """An error, to standard error."""
    typer.echo(f"error: {message}" + (f"\n  {hint}" if hint else ""), err=True)


def show(value: Any, table: Table, as_json: bool) -> None:
    """One answer: ``value`` as JSON, or the table."""
    if as_json:
        print_json(value)
    else:
        console().print(table)


def print_json(value: Any) -> None:
    """One line of JSON. Dataclasses become objects, bytes hex."""
    typer.echo(json.dumps(value, default=_plain, ensure_ascii=False))


def table_of(columns: Iterable[str], rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """Columns whose name ends in ``>`` are numbers, set to the right."""
    table = Table(title=title or None, title_justify="left", header_style="bold", box=None)
    for name in columns:
        right = name.endswith(">")
        table.add_column(
            name.removesuffix(">"), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def instant(unix_ms: int) -> str:
    """Local time of an instant of the store's clock."""
    moment = datetime.fromtimestamp(unix_ms / 1000, UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")
