"""Every setting as Markdown, from the schema: ``docs/SETTINGS.md`` is what this prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gateway.cli.schema import REQUIRED, Group, Leaf, Node, Sequence, Table, kind_name, schema
from gateway.cli.sources import ALIASES, COMMON, PROCESSES

HEAD = f"""# Settings

Made by `sessile config reference > docs/SETTINGS.md`; a test keeps it current.

Later wins, value by value: the default, the TOML file (`--config FILE`, or `SESSILE_CONFIG`), the
environment, the command's own flags, `--set PATH=VALUE`.

| | `[gateway.times]` `fleet_poll_s = 0.5` |
|---|---|
| environment | `SESSILE_GATEWAY__TIMES__FLEET_POLL_S=0.5` (names are lower case) |
| flag | `sessile gateway --set times.fleet_poll_s=0.5` |

`[{COMMON}]` holds what gateways and workers both have, such as `redis_url`; a process's own table
wins over it. In the environment and `--set`, lists and tables are in TOML's notation. Relative
paths in a file are relative to the file. Names that nobody knows are refused with the nearest one.
`sessile config check FILE` says all that is wrong with a file, `sessile config show [--defaults]`
what a process would run with and where each value is from; secrets are masked.

Also read: {", ".join(f"`{name}` (as `{'.'.join(path)}`)" for name, path in ALIASES.items())}.
"""


def markdown() -> str:
    """The whole document."""
    lines = [HEAD]
    for process in PROCESSES:
        lines += _section(schema(process), process, depth=2)
    return "\n".join(lines).rstrip() + "\n"


def _section(group: Group, path: str, depth: int) -> Iterator[str]:
    yield f"{'#' * depth} `{path}`\n"
    yield f"{_one_line(group.doc)}\n"
    own = {name: node for name, node in group.members.items() if not isinstance(node, Group)}
    if own:
        yield "| setting | what | default | |"
        yield "|---|---|---|---|"
        for name, node in own.items():
            cells = (f"`{name}`", _kind(node), _default(node), _one_line(node.doc))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""
    for name, member in group.members.items():
        if isinstance(member, Group):
            yield from _section(member, f"{path}.{name}", depth=3)
        elif isinstance(member, Table | Sequence) and isinstance(member.item, Group):
            yield from _section(member.item, f"{path}.{name}.*", depth=3)


def _kind(node: Node) -> str:
    match node:
        case Leaf(kind=kind):
            return kind_name(kind)
        case Table(item=item):
            return f"a table ({'settings' if isinstance(item, Group) else _kind(item)} by name)"
        case Sequence():
            return "a list of tables"
    raise TypeError(f"{type(node).__name__} is not one setting")


def _default(node: Node) -> str:
    value: Any = getattr(node, "default", REQUIRED)
    if value is REQUIRED:
        return "must be set"
    if value is None:
        return "not set"
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, Mapping | tuple) and not isinstance(node, Leaf):
        return f"{len(value)} entries" if value else "empty"
    return f"`{json.dumps(value, default=str)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")
