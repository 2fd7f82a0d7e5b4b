import json
import threading
from datetime import date
from typing import Annotated, Literal

import anyio
import pytest
from pydantic import BaseModel, Field

from swarm_sdk.errors import ConfigError, ToolError
from swarm_sdk.tools.function import FunctionTool, tool
from swarm_sdk.types import Image, RunContext, ToolOutput


class Point(BaseModel):
    x: int
    title: str = "origin"


class NoResources:
    async def get(self, key, start):
        raise AssertionError("not asked for")


CONTEXT = RunContext(
    episode_id="e",
    agent_path="main/a.1",
    call_id="functions.f:0",
    deps=None,
    resources=NoResources(),
)


def call(function, /, **arguments):
    made = function if isinstance(function, FunctionTool) else FunctionTool(function)
    return anyio.run(made, arguments, CONTEXT)


def test_the_signature_and_the_docstring_become_the_spec():
    @tool
    def area(
        width: float,
        unit: Literal["m", "km"] = "m",
        note: str | None = None,
        points: list[int] | None = None,
        scale: Annotated[float, Field(gt=0, description="how much")] = 1.0,
    ) -> float:
        """Area of a
        rectangle.

        It has four corners.

        Args:
            width: in metres,
                from left to right.
            unit (str): of the result

        Returns:
            width: not an argument.
        """
        return width

    assert area.spec.name == "area"
    assert area.spec.description == "Area of a rectangle."
    assert area.spec.parameters["required"] == ["width"]
    assert area.spec.parameters["properties"] == {
        "width": {"type": "number", "description": "in metres, from left to right."},
        "unit": {
            "type": "string",
            "enum": ["m", "km"],
            "description": "of the result",
            "default": "m",
        },
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "points": {
            "anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}],
            "default": None,
        },
        "scale": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "how much",
            "default": 1.0,
        },
    }


def test_a_pydantic_model_keeps_a_field_named_title_and_loses_the_generated_titles():
    def move(to: Point) -> None: ...

    parameters = FunctionTool(move).spec.parameters
    assert parameters["$defs"]["Point"] == {
        "type": "object",
        "properties": {
            "x": {"type": "integer"},
            "title": {"type": "string", "default": "origin"},
        },
        "required": ["x"],
    }
    assert json.loads(json.dumps(parameters)) == parameters


def test_name_and_description_can_be_given():
    @tool(name="look-up", description="Find it.")
    def f(key: str) -> str:
        return key

    assert (f.spec.name, f.spec.description) == ("look-up", "Find it.")


def test_arguments_are_coerced_to_their_types():
    def f(number: int, day: date, point: Point, names: set[str]) -> list[str]:
        assert isinstance(point, Point)
        return [repr(number), repr(day), repr(sorted(names))]

    output = call(f, number="3", day="2026-01-31", point={"x": 1}, names=["b", "a", "a"])
    assert json.loads(output.content) == ["3", "datetime.date(2026, 1, 31)", "['a', 'b']"]


def test_arguments_may_have_names_that_pydantic_reserves():
    def f(schema: str, copy: str, _hidden: int, model_config: int = 1) -> str:
        return schema + copy

    assert call(f, schema="a", copy="b", _hidden=1) == ToolOutput("ab")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x": "many"}, "argument 'x': input should be a valid integer, unable to parse"),
        ({}, "argument 'x' is missing"),
        ({"x": 1, "z": 2}, "argument 'z' is unknown to 'f'; it takes x, points"),
        ({"x": 1, "points": [{"x": 1}, {"x": []}]}, "argument 'points.1.x': input should be"),
        ({"x": 1, "points": "p" * 500}, "argument 'points': input should be a valid list"),
    ],
)
def test_a_wrong_argument_is_a_short_sentence(arguments, text):
    def f(x: int, points: list[Point] = []) -> None: ...  # noqa: B006

    with pytest.raises(ToolError) as raised:
        call(f, **arguments)
    assert str(raised.value).startswith(text)
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


def test_the_context_is_injected_and_not_shown_to_the_model():
    async def whoami(context: RunContext, loud: bool = False) -> str:
        return context.agent_path.upper() if loud else context.agent_path

    assert list(FunctionTool(whoami).spec.parameters["properties"]) == ["loud"]
    assert call(whoami, loud=True).content == "MAIN/A.1"
    with pytest.raises(ToolError, match="'context' is unknown"):
        call(whoami, context="mine")


@pytest.mark.parametrize(
    ("result", "content"),
    [
        ("text", "text"),
        (None, ""),
        (3, "3"),
        (True, "true"),
        ({"a": [1, None], "é": date(2026, 1, 2)}, '{"a":[1,null],"é":"2026-01-02"}'),
        (Point(x=1), '{"x":1,"title":"origin"}'),
        ([Point(x=1)], '[{"x":1,"title":"origin"}]'),
        (float("nan"), "NaN"),
    ],
)
def test_results_become_text(result, content):
    def f() -> object:
        return result

    assert call(f) == ToolOutput(content)


def test_tool_outputs_and_images_pass_through():
    picture = Image(b"png")
    given = ToolOutput("see", (picture,))

    def f() -> ToolOutput:
        return given

    def g() -> Image:
        return picture

    assert call(f) is given
    assert call(g) == ToolOutput("", (picture,))


@pytest.mark.parametrize("result", [object(), {"a": object()}, "\ud800".split])
def test_a_result_without_json_form_is_a_tool_error(result):
    def f() -> object:
        return result

    with pytest.raises(ToolError, match=r"'f' returned a .* which has no JSON form"):
        call(f)


def test_a_circular_result_is_a_tool_error():
    def f() -> object:
        ring: list[object] = []
        ring.append(ring)
        return ring

    with pytest.raises(ToolError, match="no JSON form"):
        call(f)


def test_synchronous_functions_leave_the_event_loop_free():
    caller = threading.get_ident()

    def f() -> bool:
        return threading.get_ident() != caller

    async def g() -> bool:
        return threading.get_ident() == caller

    assert call(f).content == "true"
    assert call(g).content == "true"


def test_what_the_function_raises_passes_through():
    def f() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call(f)


def test_methods_can_be_tools():
    class Counter:
        count = 0

        def add(self, by: int) -> int:
            """Count."""
            self.count += by
            return self.count

    adder = FunctionTool(Counter().add)
    assert adder.spec.parameters["required"] == ["by"]
    call(adder, by=2)
    assert call(adder, by=3).content == "5"


def _args(*names: str) -> None: ...
def _kwargs(**names: str) -> None: ...
def _positional(name: str, /) -> None: ...
def _bare(name) -> None: ...
def _late(name: str, context: RunContext) -> None: ...
def _unknown(name: "Nowhere") -> None: ...  # noqa: F821
def _untold(name: threading.Lock) -> None: ...


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: x, "must be a named function"),
        (Point(x=1), "must be a named function"),
        (_args, "no name to pass it by"),
        (_kwargs, "no name to pass it by"),
        (_positional, "no name to pass it by"),
        (_bare, "'name' of tool '_bare' needs a type"),
        (_late, "must be its first parameter"),
        (_unknown, "type that cannot be found"),
        (_untold, "cannot fill in parameter 'name'"),
    ],
)
def test_what_a_model_cannot_call_is_refused_at_once(function, text):
    with pytest.raises(ConfigError, match=text):
        tool(function)


@pytest.mark.parametrize("name", ["", "two words", "9lives", "x" * 65, "é"])
def test_names_that_chat_formats_cannot_carry_are_refused(name):
    def f() -> None: ...

    with pytest.raises(ConfigError, match="cannot be a tool's name"):
        FunctionTool(f, name=name)
