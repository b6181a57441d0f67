"""Everything on the wire says what it is: units, bounds, who sets it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "proto").rglob("*.proto"))
DECLARES = re.compile(
    r"(message|enum|service|rpc|oneof) \w+|(repeated |optional )?[\w.<>, ]+ \w+ = \d+( \[.*\])?;"
)


def undocumented(text: str) -> list[str]:
    """Declarations without a comment right before or behind them."""
    found, before = [], ""
    for line in map(str.strip, text.splitlines()):
        declares = DECLARES.match(line) and not line.startswith(("syntax", "import", "package"))
        if declares and not before.startswith("//") and "//" not in line:
            found.append(line)
        before = line
    return found


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_messages_fields_values_and_calls_have_comments(path: Path) -> None:
    text = path.read_text()
    assert undocumented(text) == []
    # And it would be noticed: without its comments nearly every line of a file declares something.
    assert len(undocumented(re.sub(r"//.*", "", text))) > text.count("=") // 2


def test_a_missing_comment_is_found() -> None:
    text = "// A.\nmessage A {\n  uint32 b = 1;\n  // C.\n  repeated string c = 2;\n}\nenum E {\n}"
    assert undocumented(text) == ["uint32 b = 1;", "enum E {"]
