"""docs/OBSERVABILITY.md lists every metric as it is. Print the table: python -m this module."""

from __future__ import annotations

from pathlib import Path

from gateway.telemetry.instruments import GATEWAY, INSTRUMENTS, Instrument

PAGE = Path(__file__).parents[2] / "docs/OBSERVABILITY.md"


def row(one: Instrument) -> str:
    by = "gateway" if one.name in GATEWAY else "worker"
    attributes = ", ".join(f"`{name}`" for name in one.attributes)
    unit = one.unit.strip("{}")
    return f"| `{one.name}` | {by} | {one.kind}, {unit} | {one.description} | {attributes} |"


def table() -> str:
    head = ["| metric | by | kind | what | attributes |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, INSTRUMENTS.values())])


def test_the_table_of_metrics_is_current() -> None:
    text = PAGE.read_text()
    found = text.partition("-->\n")[2].partition("<!-- end of metrics")[0]
    assert found.strip() == table(), "replace it by what this module prints"


if __name__ == "__main__":
    print(table())
