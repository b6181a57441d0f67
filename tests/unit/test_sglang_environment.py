"""The environment of the tests with the real sglang, of which nothing is resolved."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=~; ]", requirement)[0].lower().replace("_", "-")


def test_it_has_everything_that_the_server_and_its_client_need() -> None:
    listed = {
        _name(line)
        for line in (ROOT / "tests/sglang/requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    for folder in (ROOT, ROOT / "sdk"):
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        needed = {_name(requirement) for requirement in project["dependencies"]}
        assert needed - listed <= {"sessile"}
