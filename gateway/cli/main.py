"""The ``sessile`` command."""

from __future__ import annotations

import enum
import importlib
import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from sessile.credentials import API_KEY_VARIABLE, TLS_VARIABLE

from gateway.cli import chat, config, doctor, fleet, health, keys, serve, sessions, top
from gateway.cli.output import JsonOption, fail, reported_errors, use_credentials


class DemoEngine(enum.StrEnum):
    """Engines that the demo's fleet fits on a small machine with."""

    SIM = "sim"
    TORCH = "torch"


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Stateful sessions for LLM inference. Start with: sessile up",
)


@app.callback()
def root(
    api_key: Annotated[
        str,
        typer.Option(envvar=API_KEY_VARIABLE, help="For calls to a gateway that asks for one."),
    ] = "",
    tls: Annotated[
        str,
        typer.Option(
            envvar=TLS_VARIABLE,
            help="Calls use TLS: 1 for the system's authorities, or a PEM file of the gateways'.",
        ),
    ] = "",
) -> None:
    """Stateful sessions for LLM inference. Start with: sessile up"""
    use_credentials(api_key, tls)


app.command()(serve.up)
app.command()(chat.chat)
app.add_typer(sessions.app, name="sessions")
app.add_typer(fleet.app, name="replicas")
app.command()(fleet.migrate)
app.command()(serve.gateway)
app.command()(serve.worker)
app.command()(health.health)
app.command()(top.top)
app.command()(doctor.doctor)
app.add_typer(config.app, name="config")
app.add_typer(keys.app, name="keys")


@app.command()
def demo(
    engine: Annotated[
        DemoEngine | None, typer.Option(help="Default: torch if it is installed, else sim.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the report is written.")] = Path(
        "demo-report.json"
    ),
    faults: Annotated[
        bool, typer.Option(help="Without: measure how much of the prompts comes from KV caches.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Run agents on a small fleet, break things, and report what happened to them."""
    try:
        run_demo = importlib.import_module("loadtest.demo.main").run_demo
    except ImportError as error:
        fail(f"the demo is not installed ({error})")
        return
    if engine is None:
        engine = DemoEngine.TORCH if importlib.util.find_spec("torch") else DemoEngine.SIM
    with reported_errors():
        out.open("a").close()  # a report that cannot be written is told before the run, not after
        raise typer.Exit(run_demo(str(engine), out, faults=faults, as_json=as_json))


def main() -> None:
    """Entry point."""
    app()
