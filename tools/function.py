"""A typed Python function becomes a tool.

    @tool
    def area(width: float, height: float = 1.0) -> float:
        '''Area of a rectangle.

        Args:
            width: in metres.
        '''

    signature  ──> ToolSpec     the types give the JSON schema, the docstring says what for
    arguments  ──> call         validated and coerced by pydantic, one argument at a time
    result     ──> ToolOutput   text as it is, anything else as compact JSON

Asynchronous functions run in the event loop, others in a worker thread. Python cannot stop a
thread: a call that is cancelled or out of time waits ``GRACE_S`` for it, then leaves it behind.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from dataclasses import dataclass
from typing import Any, Literal, overload

import anyio
import anyio.to_thread
import pydantic_core
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from swarm_sdk.errors import ConfigError, ToolError
from swarm_sdk.types import Image, RunContext, ToolOutput, ToolSpec

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GRACE_S = 2.0
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_ARGUMENT_LINE = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


@dataclass(frozen=True, slots=True)
class _Argument:
    name: str
    adapter: TypeAdapter[Any]
    default: Any
    """``inspect.Parameter.empty`` where the model must give a value."""

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


class FunctionTool:
    """A ``Tool`` that calls a Python function.

    Args:
        function: a function or method, synchronous or not, whose parameters all have a type. A
            first parameter of type ``RunContext`` gets the caller's context and is not shown to
            the model.
        name: what the model calls it; the function's own name unless given.
        description: what the model is told; the first paragraph of the docstring unless given.

    Raises:
        ConfigError: the function cannot be told to a model: a lambda, ``*args``, a parameter
            without a type or of a type that has no JSON schema.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
    ) -> None:
        if not inspect.isroutine(function) or function.__name__ == "<lambda>":
            raise ConfigError(f"a tool must be a named function, got {function!r}; use 'def'")
        self._function = function
        self._name = function.__name__ if name is None else name
        if not _NAME.fullmatch(self._name):
            raise ConfigError(
                f"'{self._name}' cannot be a tool's name; use up to 64 letters, digits, '_' and '-'"
            )
        summary, notes = _read_docstring(inspect.getdoc(function) or "")
        parameters, hints = _parameters(function, self._name)
        self._takes_context = bool(parameters) and _is_context(hints[parameters[0].name])
        self._arguments = tuple(
            _Argument(one.name, _adapter(hints[one.name], one.name, self._name), one.default)
            for one in parameters[1 if self._takes_context else 0 :]
        )
        self._is_async = inspect.iscoroutinefunction(function)
        self._spec = ToolSpec(
            name=self._name,
            description=summary if description is None else description,
            parameters=_schema(self._arguments, notes, self._name),
        )

    @property
    def spec(self) -> ToolSpec:
        """What the model is told."""
        return self._spec

    async def __call__(self, arguments: Mapping[str, Any], context: RunContext[Any]) -> ToolOutput:
        """Validate the arguments, call the function and turn its result into text.

        Raises:
            ToolError: an argument does not fit or the result has no JSON form. What the function
                raises passes through.
        """
        call = functools.partial(
            self._function,
            *([context] if self._takes_context else []),
            **self._validated(arguments),
        )
        if self._is_async:
            return self._as_output(await call())
        return self._as_output(await _in_thread(call))

    def _validated(self, given: Mapping[str, Any]) -> dict[str, Any]:
        known = [argument.name for argument in self._arguments]
        for name in given:
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise ToolError(f"argument '{name}' is unknown to '{self._name}'; {takes}")
        values = {}
        for argument in self._arguments:
            if argument.name in given:
                values[argument.name] = _validate(argument, given[argument.name])
            elif argument.is_required:
                raise ToolError(f"argument '{argument.name}' is missing")
        return values

    def _as_output(self, result: Any) -> ToolOutput:
        if isinstance(result, ToolOutput):
            return result
        if isinstance(result, Image):
            return ToolOutput("", (result,))
        if result is None or isinstance(result, str):
            return ToolOutput(result or "")
        try:
            return ToolOutput(pydantic_core.to_json(result, inf_nan_mode="constants").decode())
        except ValueError as error:
            raise ToolError(
                f"'{self._name}' returned a {type(result).__name__}, which has no JSON form; "
                "return text, numbers, lists, dicts or pydantic models"
            ) from error


async def _in_thread(call: Callable[[], Any]) -> Any:
    """Call in a worker thread; on cancellation wait for it a little, then leave it behind."""
    is_over = False

    def run() -> Any:
        nonlocal is_over
        try:
            return call()
        finally:
            is_over = True

    try:
        return await anyio.to_thread.run_sync(run, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        with anyio.move_on_after(GRACE_S, shield=True):
            while not is_over:  # noqa: ASYNC110 - set in a thread that knows no event loop
                await anyio.sleep(0.005)
        raise


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
    """Make a ``FunctionTool`` of a function: ``@tool`` or ``@tool(name="…")``.

    Raises:
        ConfigError: as ``FunctionTool``.
    """
    make = functools.partial(FunctionTool, name=name, description=description)
    return make if function is None else make(function)


def _parameters(
    function: Callable[..., Any], name: str
) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Read the function's parameters and their types, all of a kind that a model can fill in."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = list(inspect.signature(function).parameters.values())
    except NameError as error:
        raise ConfigError(
            f"tool '{name}' has a type that cannot be found ({error}); import it at run time"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the types of tool '{name}' cannot be read: {error}") from error
    for index, parameter in enumerate(parameters):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"parameter '{parameter.name}' of tool '{name}' has no name to pass it by; "
                "use plain parameters, no '*args', '**kwargs' or '/'"
            )
        if parameter.name not in hints:
            raise ConfigError(f"parameter '{parameter.name}' of tool '{name}' needs a type")
        is_context = _is_context(hints[parameter.name])
        if is_context and (index > 0 or parameter.kind is parameter.KEYWORD_ONLY):
            raise ConfigError(f"the RunContext of tool '{name}' must be its first parameter")
    return parameters, hints


def _is_context(hint: Any) -> bool:
    return hint is RunContext or typing.get_origin(hint) is RunContext


def _adapter(hint: Any, argument: str, name: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint)
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise ConfigError(
            f"a model cannot fill in parameter '{argument}' of tool '{name}', of type {hint}"
        ) from error


def _schema(
    arguments: tuple[_Argument, ...], notes: Mapping[str, str], name: str
) -> dict[str, Any]:
    """JSON schema of all arguments; ``notes`` are the docstring's words about each."""
    mode: Literal["validation"] = "validation"
    try:
        schemas, definitions = TypeAdapter.json_schemas(
            [(argument.name, mode, argument.adapter) for argument in arguments]
        )
    except PydanticUserError as error:
        raise ConfigError(f"the arguments of tool '{name}' have no JSON schema: {error}") from error
    properties = {}
    for argument in arguments:
        schema = _without_titles(schemas[argument.name, mode])
        if argument.name in notes and "description" not in schema:
            schema["description"] = notes[argument.name]
        if not argument.is_required:
            default = pydantic_core.to_jsonable_python(argument.default, serialize_unknown=True)
            schema.setdefault("default", default)
        properties[argument.name] = schema
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    parameters["required"] = [one.name for one in arguments if one.is_required]
    if definitions:
        parameters["$defs"] = {
            key: _without_titles(value) for key, value in definitions["$defs"].items()
        }
    return parameters


def _without_titles(schema: Any) -> Any:
    """Drop pydantic's titles, which repeat the names and cost the model tokens."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in ("default", "const", "enum", "examples") else _without_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def _validate(argument: _Argument, value: Any) -> Any:
    try:
        return argument.adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join([argument.name, *map(str, first["loc"])])
        message = first["msg"][:1].lower() + first["msg"][1:]
        shown = repr(first["input"])
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise ToolError(f"argument '{path}': {message}, got {shown}") from error


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Give the first paragraph on one line, and what a Google-style ``Args:`` section says."""
    lines = text.splitlines()
    summary = " ".join(text.partition("\n\n")[0].split())
    if "Args:" not in lines:
        return summary, {}
    notes: dict[str, str] = {}
    section = lines[lines.index("Args:") + 1 :]
    margin, current = None, ""
    for line in section:
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            break
        margin = indent if margin is None else margin
        entry = _ARGUMENT_LINE.fullmatch(line.strip()) if indent == margin else None
        if entry:
            current = entry[1]
            notes[current] = entry[2]
        elif current:
            notes[current] = f"{notes[current]} {line.strip()}".strip()
    return summary, notes
