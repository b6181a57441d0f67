"""A Python function as a tool: its signature becomes the JSON Schema that the model is shown, and
the model's arguments are checked against it before the function is called.

@sessile.tool
def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
    '''The weather of a city.

    Args:
        city: name in English
    '''

session = await client.open(tools=[weather])
print((await session.run_tools("Is it warm in Rome?").result()).text)
"""

from __future__ import annotations

import asyncio
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import msgspec

from sessile.messages import Tool

_REFUSED_KINDS = {
    inspect.Parameter.VAR_POSITIONAL: "takes *args",
    inspect.Parameter.VAR_KEYWORD: "takes **kwargs",
    inspect.Parameter.POSITIONAL_ONLY: "has a positional-only parameter",
}
_ARGUMENT = re.compile(r"(\w+)(?:\s*\([^)]*\))?:\s*(.*)")
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?):\s*")


class BadArguments(ValueError):
    """The model's arguments do not fit the function; the text says which and why."""


@dataclass(frozen=True, slots=True)
class FunctionTool(Tool):
    """A tool that is a Python function; made by :func:`sessile.tool`. Calling it calls the
    function as it is; :meth:`invoke` calls it as the model does."""

    function: Callable[..., Any] = lambda: None
    arguments_type: type[msgspec.Struct] = msgspec.Struct

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def parse(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """JSON values as what the signature says; raises BadArguments. Numbers and booleans may be
        strings, as models write them now and then."""
        try:
            parsed = msgspec.convert(
                dict(arguments), self.arguments_type, strict=False, dec_hook=_from_json
            )
        except msgspec.ValidationError as error:
            raise BadArguments(f"arguments of {self.name}: {error}") from error
        return {name: getattr(parsed, name) for name in self.arguments_type.__struct_fields__}

    async def invoke(self, arguments: Mapping[str, Any]) -> str:
        """The function's result as the model will read it: a string as it is, anything else as
        JSON. A function that is not async runs in a thread. Raises BadArguments, TypeError for a
        result that is no JSON, and whatever the function does."""
        parsed = self.parse(arguments)
        if inspect.iscoroutinefunction(self.function):
            result = await self.function(**parsed)
        else:
            result = await asyncio.to_thread(self.function, **parsed)
            if inspect.isawaitable(result):
                result = await result
        if isinstance(result, str):
            return result
        return msgspec.json.encode(result, enc_hook=_to_json).decode()


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Makes a tool of a function, sync or async: ``@tool`` or ``@tool(name=…, description=…)``.

    The docstring's text before its first section is the description, its ``Args:`` describe the
    parameters (so does ``Annotated[int, "what it is"]``). Annotations may be what JSON can hold:
    numbers, strings, bool, None, lists, dicts, Literal, unions with None, enums, dates,
    dataclasses, TypedDicts, msgspec structs, pydantic models. Raises TypeError for a
    signature of which no schema can be made."""
    if function is None:
        return lambda made: _made(made, name, description)
    return _made(function, name, description)


def _made(function: Callable[..., Any], name: str | None, description: str | None) -> FunctionTool:
    called = str(name or getattr(function, "__name__", ""))
    if not re.fullmatch(r"[A-Za-z_][\w-]{0,63}", called):
        raise TypeError(f"a tool needs a name of letters, digits, _ and -, not {called!r}")
    text, described = _docstring(inspect.getdoc(function) or "")
    arguments = _arguments_type(function, called, described)
    try:
        _, definitions = msgspec.json.schema_components(
            [arguments], schema_hook=_schema_of, ref_template="#/$defs/{name}"
        )
    except TypeError as error:
        raise TypeError(f"the tool {called}: {error}") from error
    schema = definitions.pop(arguments.__name__)
    schema.pop("title", None)
    if definitions:
        schema["$defs"] = definitions
    return FunctionTool(
        called, text if description is None else description, schema, function, arguments
    )


def _arguments_type(
    function: Callable[..., Any], name: str, described: Mapping[str, str]
) -> type[msgspec.Struct]:
    """A struct of the function's parameters."""
    try:
        hints = typing.get_type_hints(_annotated(function), include_extras=True)
    except NameError as error:
        raise TypeError(
            f"the tool {name}: {error}; annotations are looked up in the function's module, "
            "so define their types there"
        ) from error
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in _REFUSED_KINDS:
            raise TypeError(
                f"the tool {name} {_REFUSED_KINDS[parameter.kind]} ({parameter.name}): "
                "name each parameter, so that the model can"
            )
        if parameter.name not in hints:
            raise TypeError(
                f"the tool {name} has no annotation for {parameter.name}: say what it is, "
                "the model's schema is made of it"
            )
        hint = _described(hints[parameter.name], described.get(parameter.name))
        if parameter.default is inspect.Parameter.empty:
            fields.append((parameter.name, hint))
        else:
            fields.append((parameter.name, hint, _default(parameter.default)))
    return msgspec.defstruct(f"{name}_arguments", fields, kw_only=True, forbid_unknown_fields=True)


def _annotated(function: Callable[..., Any]) -> Any:
    """What carries the annotations: of a callable object, its ``__call__``."""
    if inspect.isroutine(function):
        return function
    return type(function).__call__


def _default(value: Any) -> Any:
    """Mutable defaults are made anew, as msgspec wants them; Python's own rule (one object for all
    calls) is nobody's wish here."""
    if isinstance(value, list | dict | set):
        kept = value.copy()
        return msgspec.field(default_factory=lambda: kept.copy())
    return value


def _described(hint: Any, text: str | None) -> Any:
    """The annotation with its description where msgspec looks for it."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *notes = typing.get_args(hint)
        words = [note for note in notes if isinstance(note, str)]
        others = [note for note in notes if not isinstance(note, str)]
        text = " ".join(words) or text
        hint = typing.Annotated[(kind, *others)] if others else kind
    return typing.Annotated[hint, msgspec.Meta(description=text)] if text else hint


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and what ``Args:`` says of each parameter."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if _SECTION.fullmatch(line)]
    description = "\n".join(lines[: starts[0]] if starts else lines).strip()
    found: dict[str, str] = {}
    for start, end in pairwise([*starts, len(lines)]):
        if lines[start].startswith(("Args", "Arguments", "Parameters")):
            found = _arguments(lines[start + 1 : end])
    return description, found


def _arguments(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    current, indent = "", None
    for line in lines:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        match = _ARGUMENT.fullmatch(line.strip()) if depth <= indent else None
        if match:
            current = match[1]
            found[current] = match[2]
        elif current:
            found[current] = f"{found[current]} {line.strip()}".strip()
    return found


def _schema_of(kind: Any) -> dict[str, Any]:
    """Of a type that msgspec does not know: a pydantic model, without importing pydantic."""
    if isinstance(kind, type) and hasattr(kind, "model_json_schema"):
        schema: dict[str, Any] = kind.model_json_schema()
        if "$defs" in schema:
            # Their references would point to the root of the tool's schema.
            schema = _inlined(schema, schema.pop("$defs"), ())
        return schema
    raise TypeError(f"{kind!r} has no JSON Schema; use what JSON can hold")


def _inlined(node: Any, definitions: Mapping[str, Any], seen: tuple[str, ...]) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions, seen) for item in node]
    if not isinstance(node, dict):
        return node
    reference = node.get("$ref")
    if isinstance(reference, str):
        name = reference.rpartition("/")[2]
        if name in seen:
            raise TypeError(f"{name} refers to itself: no schema for a model can say that")
        return _inlined(definitions[name], definitions, (*seen, name))
    return {key: _inlined(value, definitions, seen) for key, value in node.items()}


def _from_json(kind: type[Any], value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)  # its ValidationError is a ValueError
    raise NotImplementedError(f"cannot make a {kind!r}")


def _to_json(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"a tool's result must be what JSON can hold, not {type(value).__name__}")
