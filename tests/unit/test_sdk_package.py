"""What importing the package costs, and that its two faces have the same members."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest
import sessile
from sessile import sync


def test_the_stubs_are_imported_without_the_client() -> None:
    code = "import sys, sessile.v1.types_pb2; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert "sessile.v1.types_pb2" in loaded
    assert not {"grpc", "sessile.client", "sessile.errors"} & set(loaded)


def test_every_public_name_is_there() -> None:
    assert set(sessile.__all__) <= set(dir(sessile))
    for name in sessile.__all__:
        assert not isinstance(getattr(sessile, name), ModuleType)
    with pytest.raises(AttributeError, match="nonsense"):
        sessile.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_any_module_of_the_package_may_be_imported_first() -> None:
    code = """
import pkgutil, sys, sessile
for module in pkgutil.iter_modules(sessile.__path__):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sessile"]:
        del sys.modules[name]
    __import__("sessile." + module.name)
    print(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {"transport", "turn", "sync", "v1"} <= set(done.stdout.split())


RENAMED = {"aclose": "close"}


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize("name", sync.__all__)
def test_the_sync_face_has_every_member_with_the_same_parameters(name: str) -> None:
    """Return types differ by construction: a handle of the face itself, an iterator."""
    ours, theirs = getattr(sync, name), getattr(sessile, name)
    members = public(theirs)
    assert {RENAMED.get(member, member) for member in members} <= public(ours)
    if name == "Sessile":
        members.add("__init__")
    for member in sorted(members):
        there = inspect.getattr_static(theirs, member)
        here = inspect.getattr_static(ours, RENAMED.get(member, member))
        assert isinstance(here, property) == isinstance(there, property)
        if not isinstance(here, property):
            expected = inspect.signature(there).parameters
            assert inspect.signature(here).parameters == expected, f"{name}.{member}"
