"""``sessile config``: check settings before a process is started with them, and see what holds."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.output import JsonOption, print_json, show, table_of, tell
from gateway.cli.serve import ConfigOption, SetOption, made_up_names
from gateway.cli.sources import PROCESSES, SettingsRefused

if TYPE_CHECKING:
    from gateway.cli.settings import Loaded

app = typer.Typer(no_args_is_help=True, help="Check and show settings.")


class Process(enum.StrEnum):
    """Whose settings."""

    GATEWAY = "gateway"
    WORKER = "worker"


ProcessOption = Annotated[
    Process | None, typer.Option("--process", help="Only of a gateway, or only of a worker.")
]


@app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Default: the one SESSILE_CONFIG names.")
    ] = None,
    process: ProcessOption = None,
    assignments: SetOption = None,
) -> None:
    """Check a file, with the environment as it is here, as a process does that starts with it.

    Ends with 1 and every problem if it would be refused."""
    for name, loaded in _loaded(file, process, assignments or []):
        for path in loaded.missing:
            typer.echo(f"note: {path} is not set here; a {name} needs it when it starts", err=True)
        typer.echo(f"{name}: {len(loaded.origins)} settings given, all accepted")


@app.command("show")
def show_settings(
    config: ConfigOption = None,
    process: ProcessOption = None,
    assignments: SetOption = None,
    defaults: Annotated[bool, typer.Option(help="Also what nobody set.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the settings that a process started here would run with, and where each is from."""
    from gateway.cli.effective import DEFAULT, effective

    rows = [
        row
        for name, loaded in _loaded(config, process, assignments or [])
        for row in effective(name, loaded)
        if defaults or row.origin != DEFAULT
    ]
    if as_json:
        print_json({row.setting: {"value": row.value, "from": row.origin} for row in rows})
        return
    cells = [(row.setting, _text(row.value), row.origin) for row in rows]
    show(rows, table_of(("setting", "value", "from"), cells), as_json=False)


@app.command()
def reference() -> None:
    """Print the description of every setting as Markdown (docs/SETTINGS.md)."""
    from gateway.cli.reference import markdown

    typer.echo(markdown(), nl=False)


def _loaded(
    file: Path | None, process: Process | None, assignments: list[str]
) -> Iterator[tuple[str, Loaded]]:
    from gateway.cli.settings import load

    refused: list[str] = []
    for name in PROCESSES if process is None else (str(process),):
        try:
            yield (
                name,
                load(
                    name,
                    file=file,
                    assignments=assignments,
                    generated=made_up_names(name),
                    may_miss=True,
                ),
            )
        except SettingsRefused as error:
            refused += error.problems
    for problem in dict.fromkeys(refused):
        tell(problem)
    if refused:
        raise typer.Exit(1)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)
