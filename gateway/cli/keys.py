"""``sessile keys``: API keys in a file that gateways read, made, listed and revoked.

Gateways notice the change by themselves. A rotation is: create, hand out, revoke the old one.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.output import JsonOption, fail, print_json, reported_errors, show, table_of
from gateway.core.errors import InvalidRequest
from gateway.security.access import Role
from gateway.security.keys import PREFIX, ApiKey, edited, load_keys, new_key

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

FileOption = Annotated[
    Path, typer.Option("--file", envvar="SESSILE_API_KEYS", help="The file of `--api-keys`.")
]
SHOWN = ("id", "tenant", "role", "created", "expires", "state", "note")


@app.command()
def create(
    file: FileOption,
    tenant: Annotated[str, typer.Option(help="Whose sessions the key is for.")] = "default",
    role: Annotated[
        Role, typer.Option(help="agent: its tenant's sessions; operator: the fleet, any tenant.")
    ] = Role.AGENT,
    expires_days: Annotated[
        float | None, typer.Option(min=0, max=36_500, help="Default: when it is revoked.")
    ] = None,
    note: Annotated[str, typer.Option(help="Free text: who has it, what for.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, this once: the file only has its hash."""
    now = datetime.now(UTC).replace(microsecond=0)
    expires = None if expires_days is None else now + timedelta(days=expires_days)
    with reported_errors(ValueError, InvalidRequest):
        secret, key = new_key(tenant, role, now, expires, note)
        with edited(file) as keys:
            keys.append(key)
    if as_json:
        print_json({"key": secret, **_shown(key, now)})
    else:
        typer.echo(secret)
        typer.echo(f"for {tenant} as {role}; it is shown only now, {file} has its hash", err=True)


@app.command("list")
def list_keys(file: FileOption, as_json: JsonOption = False) -> None:
    """List keys, oldest first; the secrets are nowhere."""
    now = datetime.now(UTC)
    with reported_errors(ValueError):
        shown = [_shown(key, now) for key in sorted(load_keys(file), key=lambda key: key.created)]
    show(shown, table_of(SHOWN, [list(key.values()) for key in shown]), as_json)


@app.command()
def revoke(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As in the list, or the key.")],
    file: FileOption,
    as_json: JsonOption = False,
) -> None:
    """Take keys out of the file; gateways refuse calls and end streams with them in a second."""
    wanted = {identity.removeprefix(PREFIX).partition("-")[0] for identity in ids}
    with reported_errors(ValueError):
        if not file.exists():
            fail(f"{file} is not there")
        with edited(file) as keys:
            unknown = wanted - {key.id for key in keys}
            if not unknown:
                keys[:] = [key for key in keys if key.id not in wanted]
    if unknown:
        fail(f"{file} has no key {', '.join(sorted(unknown))}", "Nothing was revoked.")
    if as_json:
        print_json({"revoked": sorted(wanted)})
    else:
        typer.echo(f"revoked {' '.join(PREFIX + key for key in sorted(wanted))}")


def _shown(key: ApiKey, now: datetime) -> dict[str, str]:
    values = {
        **dataclasses.asdict(key),
        "id": PREFIX + key.id,
        "role": str(key.role),
        "created": f"{key.created:%Y-%m-%d %H:%M}",
        "expires": f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "-",
        "state": "expired" if key.expired(now) else "valid",
    }
    return {name: values[name] for name in SHOWN}
