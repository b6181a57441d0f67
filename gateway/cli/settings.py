"""Makes a process's configuration of its sources, or says everything that is wrong with them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import msgspec

from gateway.cli import sources
from gateway.cli.schema import (
    REQUIRED,
    Group,
    Leaf,
    Node,
    Sequence,
    Table,
    kind_name,
    schema,
    settings,
    unit,
)
from gateway.cli.sources import COMMON, CONFIG_VARIABLE, PROCESSES, Given, SettingsRefused, Tree

SIMILAR = 0.6
"""How alike (0 to 1) an unknown name and a known one are for the one to be proposed."""
UNSET = "redis://unset"
"""In the place of what must be given and is not (``may_miss``): the URL of a store."""
MASK = "********"
_SECRET_OPTION = re.compile(r"(api_key|password|secret|_token)$")
"""Name of an engine's option that is a secret: no schema of ours says so."""
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
_FAILED: Any = object()
"""In the place of a value that could not be made: its problem is noted already."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and where each of its values that is not a default is from."""

    config: Any
    origins: Mapping[tuple[str, ...], str]
    missing: tuple[str, ...] = ()
    """Settings that must be given before a process can start; only where that was allowed."""


def load(
    process: str,
    *,
    file: Path | None = None,
    flags: Tree | None = None,
    assignments: typing.Sequence[str] = (),
    generated: Tree | None = None,
    environment: Mapping[str, str] | None = None,
    may_miss: bool = False,
) -> Loaded:
    """The settings of ``gateway`` or ``worker``: defaults, then ``generated`` values (names made up
    by the command), the file (default: the one that SESSILE_CONFIG names), the environment, and the
    command's flags and ``--set``. Trees have the process's own names at their top. With
    ``may_miss`` the store's URL may be absent though it is needed, and is told in ``missing``.
    Raises SettingsRefused with every problem found."""
    environment = os.environ if environment is None else environment
    if file is None and environment.get(CONFIG_VARIABLE):
        file = Path(environment[CONFIG_VARIABLE])
    layers: list[Tree] = [
        {process: generated or {}},
        sources.from_file(file) if file is not None else {},
        sources.from_environment(environment),
        {process: flags or {}},
        sources.from_assignments(assignments, process),
    ]
    return build(process, layers, may_miss=may_miss)


def build(
    process: str, layers: typing.Sequence[Mapping[str, Any]], *, may_miss: bool = False
) -> Loaded:
    """A configuration of layers that have the tables of all processes at their top."""
    builder = _Builder(may_miss)
    for layer in layers:
        builder.check_tables(layer)
    own = sources.merged(
        table
        for layer in layers
        for table in (_common(layer, process), layer.get(process, {}))
        if isinstance(table, dict)
    )
    # What other processes' tables say is not used here, but a wrong name in them is told.
    for other in PROCESSES:
        if other != process:
            theirs = [layer[other] for layer in layers if isinstance(layer.get(other), dict)]
            builder.check_names(schema(other), sources.merged(theirs), (other,))
    config = builder.make(schema(process), own, (process,))
    if builder.problems:
        raise SettingsRefused(dict.fromkeys(builder.problems))
    return Loaded(config, builder.origins, tuple(builder.missing))


def _common(layer: Mapping[str, Any], process: str) -> Tree:
    """Of the common settings those that this process has; ``check_tables`` tells of the others."""
    table = layer.get(COMMON)
    if not isinstance(table, dict):
        return {}
    return {name: inner for name, inner in table.items() if name in schema(process).members}


@dataclass
class _Builder:
    may_miss: bool
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    origins: dict[tuple[str, ...], str] = field(default_factory=dict)

    def check_tables(self, layer: Mapping[str, Any]) -> None:
        """Notes tables that nobody has, and common settings that only one process has."""
        known = (*PROCESSES, COMMON)
        for name, table in layer.items():
            if not isinstance(table, dict):
                self._note((name,), table, f"settings are in tables: {_alternatives(known)}")
            elif name not in known:
                near = _proposal(name, known)
                self.problems.append(
                    f"{_origin(table)}: [{name}] is not a table of settings;{near}"
                )
            elif name == COMMON:
                self._check_common(table)

    def _check_common(self, table: Tree) -> None:
        for name, inner in table.items():
            having = [process for process in PROCESSES if name in schema(process).members]
            if len(having) == len(PROCESSES):
                continue
            if having:
                reason = f"only {having[0]} has it: write it as {having[0]}.{name}"
            else:
                shared = set.intersection(*(set(schema(p).members) for p in PROCESSES))
                reason = f"unknown setting;{_proposal(name, sorted(shared), (COMMON,))}"
            self._note((COMMON, name), inner, reason)

    def check_names(self, node: Node, given: Given | Tree, path: tuple[str, ...]) -> None:
        """Notes unknown names only."""
        if isinstance(node, Group) and isinstance(given, dict):
            for name, inner in given.items():
                if name in node.members:
                    self.check_names(node.members[name], inner, (*path, name))
                else:
                    self._unknown(node, name, inner, path)

    def make(self, node: Node, given: Given | Tree, path: tuple[str, ...]) -> Any:
        """The value of a node, or _FAILED."""
        if isinstance(given, Given) and not isinstance(node, Leaf):
            given = self._opened(node, given)
        match node:
            case Leaf():
                return self._leaf(node, given, path)
            case Group() if isinstance(given, dict):
                return self._group(node, given, path)
            case Table() if isinstance(given, dict):
                return self._table(node, given, path)
            case Sequence() if isinstance(given, Given) and isinstance(given.value, list):
                return self._sequence(node, given, path)
        wanted = "a list of tables" if isinstance(node, Sequence) else "a group of settings"
        return self._note(path, given, f"must be {wanted}, not {_shown(given)}")

    @staticmethod
    def _opened(node: Node, given: Given) -> Given | Tree:
        """A group or table that came as one value: of TOML in text."""
        if given.text:
            value = _toml(given.value)
            if value is _FAILED:
                return given
            given = dataclasses.replace(given, value=value, text=False)
        if isinstance(given.value, dict) and not isinstance(node, Sequence):
            return sources.as_tree(given)
        return given

    def _group(self, node: Group, given: Tree, path: tuple[str, ...]) -> Any:
        values: dict[str, Any] = {}
        for name, inner in given.items():
            if name in node.members:
                values[name] = self.make(node.members[name], inner, (*path, name))
            else:
                values[name] = self._unknown(node, name, inner, path)
        for name, member in node.members.items():
            if name in values:
                continue
            if isinstance(member, Group):
                values[name] = None if member.optional else self._group(member, {}, (*path, name))
            elif member.default is REQUIRED:
                values[name] = self._missing(member, (*path, name))
        if any(value is _FAILED for value in values.values()):
            return _FAILED
        try:
            return node.kind(**values)
        except ValueError as error:
            self.problems.append(f"{'.'.join(path)}: {error}{self._named_origins(str(error))}")
            return _FAILED

    def _table(self, node: Table, given: Tree, path: tuple[str, ...]) -> Any:
        made = {
            name: self.make(node.item, _as_text(inner) if node.pairs else inner, (*path, name))
            for name, inner in given.items()
        }
        if any(value is _FAILED for value in made.values()):
            return _FAILED
        return tuple(made.items()) if node.pairs else made

    def _sequence(self, node: Sequence, given: Given, path: tuple[str, ...]) -> Any:
        made: list[Any] = []
        for index, item in enumerate(given.value):
            place = (*path, str(index))
            one = dataclasses.replace(given, value=item)
            if isinstance(item, dict):
                made.append(self._group(node.item, sources.as_tree(one), place))
            else:
                made.append(self._note(place, one, f"must be a table, not {item!r}"))
        return _FAILED if any(value is _FAILED for value in made) else tuple(made)

    def _leaf(self, node: Leaf, given: Given | Tree, path: tuple[str, ...]) -> Any:
        wanted = " ".join(filter(None, (kind_name(node.kind), _in_units(path[-1]))))
        if isinstance(given, dict):
            return self._note(path, given, f"must be {wanted}, not a group of settings")
        self.origins[path] = given.origin
        try:
            value = _converted(given, node.kind)
        except msgspec.ValidationError:
            secret = node.secret or _SECRET_OPTION.search(path[-1])
            shown = MASK if secret else _shown(given)
            return self._note(path, given, f"must be {wanted}, not {shown}")
        if isinstance(value, float) and not math.isfinite(value):
            # No comparison refuses nan, and nothing that waits so long ever ends.
            return self._note(path, given, f"must be {wanted} that is finite, not {value}")
        return value

    def _unknown(self, node: Group, name: str, given: Given | Tree, path: tuple[str, ...]) -> Any:
        proposal = _proposal(name, node.members, path) or _elsewhere(name)
        return self._note((*path, name), given, f"unknown setting;{proposal}")

    def _missing(self, node: Node, path: tuple[str, ...]) -> Any:
        if self.may_miss and isinstance(node, Leaf) and node.kind is str:
            self.missing.append(".".join(path))
            return UNSET
        variable = "__".join(("SESSILE_" + path[0], *path[1:])).upper()
        alias = next((n for n, p in sources.ALIASES.items() if p[1:] == path[1:]), "")
        self.problems.append(
            f"{'.'.join(path)} must be set: in the file (--config), by {alias or variable}"
            f" or by --set {'.'.join(path[1:])}=…"
        )
        return _FAILED

    def _note(self, path: tuple[str, ...], given: Given | Tree, problem: str) -> Any:
        self.problems.append(f"{'.'.join(path)} (from {_origin(given)}): {problem}")
        return _FAILED

    def _named_origins(self, message: str) -> str:
        """Where the settings that a contradiction names are from."""
        words = set(re.findall(r"\w+", message))
        found = {
            f"{'.'.join(path)} is from {origin}"
            for path, origin in self.origins.items()
            if path[-1] in words
        }
        return f" ({'; '.join(sorted(found))})" if found else ""


def masked(node: Node, value: Any) -> Any:
    """A value as it may be shown: secrets, and the user and password of a URL, are not in it."""
    if isinstance(node, Leaf) and node.secret and value:
        return MASK
    if isinstance(node, Table) and node.pairs:
        return {
            name: MASK if text and _SECRET_OPTION.search(name) else masked(node.item, text)
            for name, text in value.items()
        }
    return _CREDENTIALS.sub(f"{MASK}@", value) if isinstance(value, str) else value


def _converted(given: Given, kind: Any) -> Any:
    """Raises msgspec.ValidationError."""
    value = given.value
    kinds = typing.get_args(kind) if NoneType in typing.get_args(kind) else (kind,)
    if given.text:
        if value == "" and NoneType in kinds:
            return None
        if str not in kinds and typing.get_origin(kind) is tuple:
            opened = _toml(value)
            value = opened if isinstance(opened, list) else [p.strip() for p in value.split(",")]

    def path_of(type_: type[Any], value: Any) -> Any:
        if type_ is Path and isinstance(value, str):
            return (given.folder or Path()) / Path(value).expanduser()
        raise msgspec.ValidationError("not a path")

    return msgspec.convert(value, kind, strict=not given.text, dec_hook=path_of)


def _as_text(given: Given | Tree) -> Given | Tree:
    """A number or truth value as the text that it is on a command line."""
    if isinstance(given, Given) and isinstance(given.value, bool | int | float):
        return dataclasses.replace(given, value=str(given.value).lower())
    return given


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return _FAILED


def _proposal(name: str, known: typing.Iterable[str], path: tuple[str, ...] = ()) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=SIMILAR)
    if near:
        return f" did you mean {'.'.join((*path, near[0]))}?"
    return "" if path else f" there are {_alternatives(names)}"


def _elsewhere(name: str) -> str:
    """For a setting's name that is right in another group, or nothing like any."""
    paths = [(process, *path) for process in PROCESSES for path, _ in settings(schema(process))]
    near = difflib.get_close_matches(name, [path[-1] for path in paths], n=1, cutoff=SIMILAR)
    if not near:
        return " `sessile config show --defaults` lists every setting"
    return " did you mean " + ".".join(next(p for p in paths if p[-1] == near[0])) + "?"


def _alternatives(names: typing.Iterable[str]) -> str:
    return ", ".join(names)


def _in_units(name: str) -> str:
    found = unit(name)
    return f"({found})" if found else ""


def _origin(given: Given | Tree) -> str:
    """Of a tree: of the first value in it."""
    return next(_origins(given), "an empty table")


def _origins(given: Given | Tree) -> Iterator[str]:
    if isinstance(given, Given):
        yield given.origin
    else:
        for inner in given.values():
            yield from _origins(inner)


def _shown(given: Given | Tree) -> str:
    if isinstance(given, dict):
        return "a group of settings"
    return _CREDENTIALS.sub(f"{MASK}@", repr(given.value))
