"""The API reference: everything public says what it is, and pdoc makes pages of it."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sessile
from sessile import sync

PDOC = [sys.executable, "-W", "error", "-m", "pdoc", "--no-show-source"]
"""As in the Makefile."""
WIRE = {"to_pb", "from_pb"}
"""Conversions for those who use the stubs: their names say all."""


def members() -> Iterator[tuple[str, Any]]:
    """Public classes and functions, and the methods and properties that are their own."""
    for module in (sessile, sync):
        for name in module.__all__:
            found = getattr(module, name)
            if not inspect.isclass(found) and not inspect.isfunction(found):
                continue  # an alias of types: documented where it is made
            yield f"{module.__name__}.{name}", found
            for member in vars(found) if inspect.isclass(found) else ():
                value = inspect.getattr_static(found, member)
                value = getattr(value, "__func__", value)
                shown = inspect.isfunction(value) or isinstance(value, property)
                if shown and not member.startswith("_") and member not in WIRE:
                    yield f"{module.__name__}.{name}.{member}", value


@pytest.mark.parametrize(("name", "member"), [pytest.param(*m, id=m[0]) for m in members()])
def test_what_is_public_says_what_it_is(name: str, member: Any) -> None:
    text = member.__doc__
    assert text, f"{name} has no docstring"
    generated = dataclasses.is_dataclass(member) and text.startswith(f"{name.split('.')[-1]}(")
    assert not generated, f"{name} has only the docstring that dataclasses make"


def test_times_and_sizes_say_their_unit_by_their_name() -> None:
    odd = [
        f"{name}({parameter.name})"
        for name, member in members()
        if inspect.isfunction(member)
        for parameter in inspect.signature(member).parameters.values()
        if "float" in str(parameter.annotation) and not parameter.name.endswith(("_s", "_ms"))
    ]
    assert odd == []


def test_every_error_is_in_the_drawing_of_the_tree() -> None:
    from sessile import errors

    classes = [getattr(sessile, name) for name in sessile.__all__]
    for cls in classes:
        if inspect.isclass(cls) and issubclass(cls, sessile.SessileError):
            assert f" {cls.__name__}" in (errors.__doc__ or "")
        elif inspect.isclass(cls) and issubclass(cls, enum.Enum):
            assert cls.__members__


def test_pdoc_makes_the_reference_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PDOC, "-o", str(tmp_path), "sessile", "sessile.sync", "!sessile.v1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    page = (tmp_path / "sessile.html").read_text()
    for name in ("Sessile.open", "Session.run_tools", "RetryPolicy.max_attempts", "tool"):
        assert f'id="{name}"' in page
    assert 'id="Session.run_tools"' in (tmp_path / "sessile" / "sync.html").read_text()
