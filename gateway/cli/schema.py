"""The one schema of settings: the frozen dataclasses, walked.

``GatewayConfig`` and ``WorkerConfig`` are the only place where a setting, its type, its default and
its description are written. A new field, or a new group (a frozen dataclass as a field's type), is
in the file, the environment, ``--set``, ``sessile config show`` and ``docs/SETTINGS.md`` at once.

What a field may be: another dataclass (or one that may be None), a mapping from names to any of
these, a tuple of dataclasses, and whatever msgspec converts from text and TOML (numbers, booleans,
text, enums, literals, paths, tuples of them). ``field(metadata={"secret": True})`` masks a value.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

from gateway.config import GatewayConfig
from workers.config import WorkerConfig

CONFIGS: Mapping[str, type[Any]] = {"gateway": GatewayConfig, "worker": WorkerConfig}
"""Table of the file -> what is made of it."""

REQUIRED: Any = object()
"""In the place of a default: the setting must be given."""

Pairs = tuple[tuple[str, str], ...]
"""Text by name, as engines take their options: written as a table."""

UNITS = {
    "_per_s": "per second",
    "_s": "seconds",
    "_ms": "milliseconds",
    "_bytes": "bytes",
    "_mb": "MiB",
    "_tokens": "tokens",
    "_chars": "characters",
    "_pages": "KV pages",
}
"""End of a setting's name -> what it counts."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value. ``kind`` is its type; ``default`` may be REQUIRED."""

    kind: Any
    default: Any = REQUIRED
    doc: str = ""
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A dataclass: names that are known. ``optional``: None unless something in it is given."""

    kind: type[Any]
    members: Mapping[str, Node]
    doc: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping: any names, each with a value of one kind. ``pairs``: made a tuple of pairs."""

    item: Node
    default: Any = REQUIRED
    doc: str = ""
    pairs: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """A tuple of groups: an array of tables in the file."""

    item: Group
    default: Any = REQUIRED
    doc: str = ""


Node = Leaf | Group | Table | Sequence


@cache
def schema(process: str) -> Group:
    """The settings of ``gateway`` or ``worker``."""
    return _group(CONFIGS[process], "")


def settings(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Every setting (not: group) with its path, in the order of the dataclasses. What is inside a
    table or a sequence has ``*`` in its path."""
    match node:
        case Group():
            for name, member in node.members.items():
                yield from settings(member, (*path, name))
        case Table(item=Group() as item) | Sequence(item=item):
            yield path, node
            yield from settings(item, (*path, "*"))
        case _:
            yield path, node


def unit(name: str) -> str:
    """What a setting of this name counts; empty if its name does not say."""
    return next((word for end, word in UNITS.items() if name.endswith(end)), "")


def kind_name(kind: Any) -> str:
    """A type in words for people who write settings."""
    words: dict[Any, str] = {
        bool: "true or false", int: "a whole number", float: "a number", str: "text",
    }  # fmt: skip
    if kind in words:
        return words[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_name(one) for one in arguments if one is not types.NoneType)
    if origin is typing.Literal:
        return " or ".join(str(one) for one in arguments)
    if origin is tuple:
        return f"a list ({kind_name(arguments[0])})"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " or ".join(str(one.value) for one in kind)
    return "a path" if getattr(kind, "__name__", "") == "Path" else getattr(kind, "__name__", "")


def _group(kind: type[Any], doc: str, *, optional: bool = False) -> Group:
    hints = typing.get_type_hints(kind)
    docs = _field_docs(kind)
    members = {
        field.name: _node(hints[field.name], _default(field), docs.get(field.name, ""), field)
        for field in dataclasses.fields(kind)
        if field.init
    }
    return Group(kind, members, doc or inspect.getdoc(kind) or "", optional)


def _node(kind: Any, default: Any, doc: str, field: dataclasses.Field[Any]) -> Node:
    if _is_config(kind):
        return _group(kind, doc)
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        configs = [one for one in arguments if _is_config(one)]
        if configs:
            return _group(configs[0], doc, optional=True)
    if kind == Pairs:
        return Table(Leaf(str), default, doc, pairs=True)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return Table(_node(arguments[1], REQUIRED, "", field), default, doc)
    if origin is tuple and arguments and _is_config(arguments[0]):
        return Sequence(_group(arguments[0], ""), default, doc)
    return Leaf(kind, default, doc, bool(field.metadata.get("secret")))


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default


def _field_docs(kind: type[Any]) -> dict[str, str]:
    """The string that follows a field in the class's source, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[before.target.id] = inspect.cleandoc(str(after.value.value))
    return docs
