"""Checks the arguments of a tool call against the tool's JSON schema, in words a model can act on.

Covered: types, required and forbidden fields, enums, arrays, nested objects, ``anyOf`` and
``$ref`` into ``$defs``. Ranges and patterns are left to the tool, which knows what they mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 64

_NAMES = {
    "string": "a string",
    "number": "a number",
    "integer": "an integer",
    "boolean": "true or false",
    "null": "null",
    "object": "an object",
    "array": "an array",
}


def parse_arguments(text: str) -> tuple[dict[str, Any], str | None]:
    """Read the JSON object in ``text``, or say why there is none.

    Returns the arguments and ``None``, or an empty object and a sentence's tail such as
    ``are not valid JSON (…)``.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return {}, f"are not valid JSON ({error.msg.lower()} at character {error.pos})"
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets without end
        return {}, "are not usable JSON (a number is too long or the nesting too deep)"
    if not isinstance(value, dict):
        return {}, f"must be one JSON object, not {_name_of(value)}"
    problem = _unusable(value, _MAX_DEPTH)
    return ({}, problem) if problem else (value, None)


def check_arguments(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """Say in one clause what is wrong with ``arguments``; ``None`` where they fit ``schema``."""
    return _check(arguments, {"type": "object", **schema}, schema.get("$defs", {}), schema, "")


def _check(
    value: Any, schema: Any, definitions: Mapping[str, Any], root: Mapping[str, Any], path: str
) -> str | None:
    schema = _resolve(schema, definitions, root)
    if isinstance(schema, bool):
        return None if schema else f"{_label(path)} is not allowed"
    where = _label(path)
    if "anyOf" in schema:
        problems = [_check(value, option, definitions, root, path) for option in schema["anyOf"]]
        if all(problems):
            return problems[0] if len(problems) == 1 else f"{where} has none of the allowed forms"
    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(json.dumps(item, ensure_ascii=False) for item in schema["enum"])
        return f"{where} must be one of {allowed}"
    kinds = schema.get("type")
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not any(_is_kind(value, kind) for kind in kinds):
            wanted = " or ".join(_NAMES.get(kind, kind) for kind in kinds)
            return f"{where} must be {wanted}, not {_name_of(value)}"
    if isinstance(value, Mapping):
        return _check_object(value, schema, definitions, root, path)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            problem = _check(item, schema["items"], definitions, root, f"{path}[{index}]")
            if problem:
                return problem
    return None


def _check_object(
    value: Mapping[str, Any],
    schema: Mapping[str, Any],
    definitions: Mapping[str, Any],
    root: Mapping[str, Any],
    path: str,
) -> str | None:
    def path_of(name: str) -> str:
        return f"{path}.{name}" if path else name

    fields = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{_label(path_of(name))} is missing"
    extra = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name not in fields and extra is False:
            known = ", ".join(fields) or "none"
            return f"{_label(path_of(name))} does not exist (it takes: {known})"
        problem = _check(item, fields.get(name, extra), definitions, root, path_of(name))
        if problem:
            return problem
    return None


def _resolve(schema: Any, definitions: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    seen: set[str] = set()
    while isinstance(schema, Mapping) and "$ref" in schema:
        reference = schema["$ref"]
        if reference in seen:  # refers to itself and says nothing
            return True
        seen.add(reference)
        schema = root if reference == "#" else definitions.get(reference.rsplit("/", 1)[-1], True)
    return schema


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    match kind:
        case "string":
            return isinstance(value, str)
        case "number":
            return isinstance(value, (int, float))
        case "integer":
            return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        case "null":
            return value is None
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, Mapping)
        case "boolean":
            return False
        case _:
            return True


def _name_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = ("string", "integer", "number", "null", "array", "object")
    return _NAMES[next(kind for kind in kinds if _is_kind(value, kind))]


def _unusable(value: Any, depth: int) -> str | None:
    """Say why ``value`` cannot be stored or sent on, or ``None``."""
    if depth == 0:
        return f"are nested more than {_MAX_DEPTH} levels deep"
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "hold half of a surrogate pair, which is no character"
    elif isinstance(value, float) and not math.isfinite(value):
        return "hold a number that is not finite"
    elif isinstance(value, (list, dict)):
        items = value if isinstance(value, list) else [*value.keys(), *value.values()]
        return next(filter(None, (_unusable(item, depth - 1) for item in items)), None)
    return None


def _label(path: str) -> str:
    return f"the argument {path!r}" if path else "the argument object"
