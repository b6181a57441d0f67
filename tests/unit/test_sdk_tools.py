"""Functions as tools: the schema that the model is shown, and the call with what it gives."""

from __future__ import annotations

import asyncio
import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, TypedDict

import pydantic
import pytest
import sessile
from sessile import BadArguments, FunctionTool


@dataclass
class Place:
    city: str
    country: str = "Italy"


class Window(TypedDict, total=False):
    start: int
    end: int


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


class Inner(pydantic.BaseModel):
    depth: int


class Filter(pydantic.BaseModel):
    limit: Annotated[int, pydantic.Field(gt=0)]
    inner: Inner


def properties(tool: FunctionTool) -> dict[str, Any]:
    found: dict[str, Any] = tool.parameters["properties"]
    return found


def test_name_description_and_parameters_come_from_the_function() -> None:
    @sessile.tool
    def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
        """The weather of a city.

        For tests.

        Args:
            city: its name
                in English
            days (int): how many

        Returns:
            nothing: this is no parameter
        """
        return f"{city} {days} {unit}"

    assert weather.name == "weather"
    assert weather.description == "The weather of a city.\n\nFor tests."
    assert weather.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its name in English"},
            "days": {"type": "integer", "default": 1, "description": "how many"},
            "unit": {"enum": ["C", "F"], "default": "C"},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    assert weather("Rome", 2) == "Rome 2 C"


def test_a_name_and_a_description_may_be_given_and_there_may_be_no_parameters() -> None:
    @sessile.tool(name="now", description="The time.")
    def clock() -> int:
        return 5

    assert (clock.name, clock.description) == ("now", "The time.")
    assert properties(clock) == {}
    assert asyncio.run(clock.invoke({})) == "5"


def test_annotations_of_every_kind_become_schemas_and_values() -> None:
    seen: list[Any] = []

    @sessile.tool
    def search(
        place: Place,
        window: Window,
        only: Filter,
        unit: Unit,
        note: Optional[str] = None,  # noqa: UP045 - as people write it
        tags: list[str] = [],  # noqa: B006 - made anew for each call
        score: Annotated[float, "0 to 1"] = 0.5,
    ) -> None:
        tags.append("seen")
        seen.append((place, window, only, unit, note, tags, score))

    shown, definitions = properties(search), search.parameters["$defs"]
    assert shown["place"] == {"$ref": "#/$defs/Place"}
    assert definitions["Place"]["required"] == ["city"]
    assert definitions["Window"]["properties"]["end"] == {"type": "integer"}
    assert shown["only"]["properties"]["inner"]["required"] == ["depth"]
    assert shown["note"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert shown["score"]["description"] == "0 to 1"

    given = {
        "place": {"city": "Rome"},
        "window": {"end": "3"},
        "only": {"limit": 1, "inner": {"depth": 2}},
        "unit": "F",
    }
    for _ in range(2):
        assert asyncio.run(search.invoke(given)) == "null"
    values = Filter(limit=1, inner=Inner(depth=2))
    expected = (Place("Rome"), {"end": 3}, values, Unit.FAHRENHEIT, None, ["seen"], 0.5)
    assert seen == [expected, expected]


@sessile.tool
def add(a: int, b: int) -> int:
    return a + b


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"a": 1}, "missing required field `b`"),
        ({"a": 1, "b": "two"}, r"Expected `int`, got `str` - at `\$.b`"),
        ({"a": 1, "b": 2, "c": 3}, "unknown field `c`"),
    ],
)
def test_arguments_that_do_not_fit_say_why(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(BadArguments, match=f"arguments of add: .*{why}"):
        add.parse(arguments)


def test_a_models_rules_of_pydantic_are_kept() -> None:
    @sessile.tool
    def find(only: Filter) -> Filter:
        return only

    good = {"only": {"limit": 1, "inner": {"depth": 2}}}
    assert asyncio.run(find.invoke(good)) == '{"limit":1,"inner":{"depth":2}}'
    with pytest.raises(BadArguments, match="greater than 0"):
        find.parse({"only": {"limit": 0, "inner": {"depth": 2}}})


def test_async_functions_run_on_the_loop_and_others_beside_it() -> None:
    @sessile.tool
    async def here() -> bool:
        return threading.current_thread() is threading.main_thread()

    @sessile.tool
    def beside() -> bool:
        return threading.current_thread() is threading.main_thread()

    assert asyncio.run(here.invoke({})) == "true"
    assert asyncio.run(beside.invoke({})) == "false"


def test_a_method_of_an_object_is_a_tool_without_self() -> None:
    class Counter:
        total = 0

        def count(self, by: int) -> int:
            """Counts."""
            self.total += by
            return self.total

    counter = Counter()
    tool = sessile.tool(counter.count)
    assert list(properties(tool)) == ["by"]
    assert asyncio.run(tool.invoke({"by": 2})) == "2"
    assert counter.total == 2


def test_a_result_that_is_no_json_says_so() -> None:
    @sessile.tool
    def strange() -> object:
        return object()

    with pytest.raises(TypeError, match="must be what JSON can hold, not object"):
        asyncio.run(strange.invoke({}))


def stars(*values: int) -> None: ...
def unnamed(a: int, /) -> None: ...
def bare(a) -> None: ...  # type: ignore[no-untyped-def]
def opaque(a: Callable[[], None]) -> None: ...
def unknown(a: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (stars, r"takes \*args"),
        (unnamed, "positional-only"),
        (bare, "no annotation for a"),
        (opaque, "JSON"),
        (unknown, "Missing.*define their types there"),
        (lambda: None, "a tool needs a name"),
    ],
)
def test_a_signature_without_a_schema_is_refused_at_once(
    function: Callable[..., Any], why: str
) -> None:
    with pytest.raises(TypeError, match=why):
        sessile.tool(function)
