"""``sessile chat``: talk to a session from a terminal."""

from __future__ import annotations

import dataclasses
import signal
import sys
from types import FrameType
from typing import Annotated

import typer
from sessile import Finished, Moved, SessileError, Tokens, TurnResult, TurnStatus, Waiting, sync

from gateway.cli import complete
from gateway.cli.output import (
    DEFAULT_GATEWAY,
    MAX_COUNT,
    GatewayOption,
    JsonOption,
    TenantOption,
    client_of,
    fail,
    print_json,
)


def chat(
    message: Annotated[
        list[str] | None, typer.Argument(help="Say this and end; without it: a conversation.")
    ] = None,
    session_id: Annotated[
        str,
        typer.Option(
            "--session",
            "-s",
            help="Go on with this session; default: a new one.",
            autocompletion=complete.sessions,
        ),
    ] = "",
    system: Annotated[str, typer.Option(help="System prompt of a new session.")] = "",
    model: Annotated[str, typer.Option()] = "",
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_COUNT)] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    gateway: GatewayOption = [DEFAULT_GATEWAY],  # noqa: B006 - typer copies it
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Talk to a session. Ctrl-C ends an answer; at the prompt (or Ctrl-D) it ends the chat."""
    with client_of(gateway, tenant) as client:
        if session_id:
            session = client.session(session_id)
            session.refresh()
        else:
            session = client.open(model=model, system=system)
        speaker = _Speaker(session, max_tokens, temperature, as_json)
        if message:
            if not speaker.say(" ".join(message)):
                raise typer.Exit(130)
            return
        interactive = sys.stdin.isatty()
        if interactive:
            typer.secho(f"session {session.session_id}", dim=True, err=True)
        while (text := _ask(interactive)) is not None:
            if text.strip():
                _say_and_go_on(speaker, text)


class _Interrupted:
    """Ctrl-C, also if its KeyboardInterrupt is raised where Python ignores exceptions (in a
    finaliser): :meth:`check` raises it again."""

    def __init__(self) -> None:
        self._seen = False
        self._before = signal.signal(signal.SIGINT, self._note)

    def check(self) -> None:
        if self._seen:
            raise KeyboardInterrupt

    def close(self) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        raise KeyboardInterrupt


class _Speaker:
    def __init__(
        self, session: sync.Session, max_tokens: int, temperature: float, as_json: bool
    ) -> None:
        self.session = session
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._as_json = as_json

    def say(self, text: str) -> bool:
        """One turn, streamed to standard output. False if Ctrl-C ended it."""
        turn = self.session.run(text, max_tokens=self._max_tokens, temperature=self._temperature)
        interrupted = _Interrupted()
        try:
            for event in turn:
                interrupted.check()
                if self._as_json:
                    continue
                if isinstance(event, Tokens | Finished):
                    typer.echo(event.text, nl=False)
                elif isinstance(event, Waiting | Moved) and sys.stderr.isatty():
                    note = f"moved to {event.target}" if isinstance(event, Moved) else "waiting"
                    typer.secho(f"[{note}]", dim=True, nl=False, err=True)
        except KeyboardInterrupt:
            # The reader is gone; the server is asked again so that the next turn finds it ended.
            self.session.cancel(turn.turn_id)
            typer.echo(" [cancelled]", err=True)
            return False
        finally:
            interrupted.close()
        self._report(turn.result())
        return True

    def _report(self, result: TurnResult) -> None:
        if self._as_json:
            print_json({"session_id": self.session.session_id, **_fields(result)})
            return
        typer.echo("")
        usage = result.usage
        if sys.stderr.isatty():
            ttft = "-" if result.ttft_ms is None else f"{result.ttft_ms:.0f} ms"
            typer.secho(
                f"{usage.output_tokens} tokens, first after {ttft};"
                f" {usage.cached_tokens} of {usage.input_tokens} input tokens were cached",
                dim=True,
                err=True,
            )
        if result.status is TurnStatus.CANCELLED:
            typer.echo("[cancelled]", err=True)


def _say_and_go_on(speaker: _Speaker, text: str) -> None:
    """An error ends the answer, not the conversation."""
    try:
        speaker.say(text)
    except SessileError as error:
        typer.echo(f"\nerror: {error}", err=True)


def _ask(interactive: bool) -> str | None:
    """The next line; None at the end."""
    try:
        return input("> ") if interactive else sys.stdin.readline() or None
    except UnicodeDecodeError as error:
        fail(f"the input is not text: {error}", "Give it as UTF-8.")
    except (EOFError, KeyboardInterrupt):
        return None


def _fields(result: TurnResult) -> dict[str, object]:
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
