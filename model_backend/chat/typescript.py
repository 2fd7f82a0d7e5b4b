"""Tools as the TypeScript text that K2.5 reads in its ``tool_declare`` turn.

    # Tools

    ## functions
    namespace functions {
    // Search the corpus.
    type search = (_: {
      // What to look for
      query: string,
      // maximum: 20, minimum: 1
      // Default: 5
      limit?: number
    }) => any;
    }

Required fields come first, then optional ones, each in alphabetical order; every dictionary of
the schema is sorted by key before anything is written, so equal tools give equal text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swarm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from swarm_sdk.types import ToolSpec

_INDENT = "  "
_ROOT_INTERFACE = "parameters"

_SCALARS = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
}
# What a member of ``"type": [...]`` is written as.
_UNION_MEMBERS = {**_SCALARS, "object": "{}", "array": "Array<any>"}
# The constraints that are told, as comments.
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}


def declare_tools(tools: Sequence[ToolSpec]) -> str:
    """Write the declaration of ``tools``; empty where there are none.

    Raises:
        ConfigError: a schema refers to a definition that it does not hold.
    """
    if not tools:
        return ""
    functions = "\n".join(_declare(tool) for tool in tools)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{functions}\n}}\n"


def _declare(tool: ToolSpec) -> str:
    schema = _sorted_by_key(tool.parameters)
    definitions: dict[str, Any] = {}
    is_recursive = False
    for node in _nodes(schema):
        definitions.update(node.get("$defs", {}))
        is_recursive |= node.get("$ref") == "#"
    _check_references(tool.name, schema, definitions)

    lines: list[str] = []
    if is_recursive:
        fields = ",\n".join(_field(*field, _INDENT) for field in _fields(schema))
        lines.append(f"interface {_ROOT_INTERFACE} {{" + (f"\n{fields}\n" if fields else "") + "}")
    for name, definition in definitions.items():
        description = definition.get("description", "") if isinstance(definition, dict) else ""
        lines += _comment(description, "")
        lines.append(f"interface {name} {_type(definition, '')}")
    lines += _comment(tool.description, "")
    argument = _ROOT_INTERFACE if is_recursive else _object(schema, "")
    lines.append(f"type {tool.name} = (_: {argument}) => any;")
    return "\n".join(lines)


def _type(schema: Any, indent: str) -> str:
    """Write the TypeScript type of ``schema``, for a field that is indented by ``indent``."""
    if isinstance(schema, bool):
        return "any" if schema else "null"
    if "$ref" in schema:
        reference = schema["$ref"]
        return _ROOT_INTERFACE if reference == "#" else reference.rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " | ".join(_type(option, indent) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(
            f'"{value}"' if isinstance(value, str) else json.dumps(value)
            for value in schema["enum"]
        )
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_UNION_MEMBERS.get(member, "any") for member in kind)
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return _array(schema, indent)
    return _SCALARS.get(kind, "any")


def _object(schema: Mapping[str, Any], indent: str) -> str:
    inner = indent + _INDENT
    fields = sorted(_fields(schema), key=lambda field: (field[2], field[0]))
    lines = [_field(*field, inner) for field in fields]
    extra = schema.get("additionalProperties")
    if extra is not None:
        extra_type = "never" if extra is False else _type(extra, inner)
        lines.append(f"{inner}[k: string]: {extra_type}")
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"


def _array(schema: Mapping[str, Any], indent: str) -> str:
    item = schema.get("items")
    if not item:
        return "Array<any>"
    inner = indent + _INDENT
    notes = _notes(item, inner)
    if not notes:
        return f"Array<{_type(item, indent)}>"
    return "\n".join(["Array<", *notes, f"{inner}{_type(item, inner)}", f"{indent}>"])


def _fields(schema: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """List name, schema and whether it is optional, for each property in schema order."""
    required = schema.get("required", ())
    return [
        (name, field, name not in required) for name, field in schema.get("properties", {}).items()
    ]


def _field(name: str, schema: Any, is_optional: bool, indent: str) -> str:  # noqa: FBT001
    lines = _notes(schema, indent)
    if isinstance(schema, dict) and schema.get("default") is not None:
        lines.append(f"{indent}// Default: {json.dumps(schema['default'], ensure_ascii=False)}")
    lines.append(f"{indent}{name}{'?' if is_optional else ''}: {_type(schema, indent)}")
    return "\n".join(lines)


def _notes(schema: Any, indent: str) -> list[str]:
    """Comment lines: the description, then the constraints."""
    if isinstance(schema, bool):
        return []
    lines = _comment(schema.get("description", ""), indent)
    kind = schema.get("type")
    is_plain = isinstance(kind, str) and not schema.keys() & {"$ref", "anyOf", "enum"}
    told = _CONSTRAINTS.get(kind, ()) if is_plain else ()
    constraints = [f"{key}: {schema[key]}" for key in told if key in schema]
    if constraints:
        lines.append(f"{indent}// {', '.join(constraints)}")
    return lines


def _comment(text: str, indent: str) -> list[str]:
    if not text:
        return []
    return [f"{indent}// {line}" if line else "" for line in text.split("\n")]


def _sorted_by_key(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted_by_key(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_sorted_by_key(item) for item in value]
    return value


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema inside ``schema``, itself first."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in ("$defs", "properties"):
        for child in schema.get(key, {}).values():
            yield from _nodes(child)
    for option in schema.get("anyOf", ()):
        yield from _nodes(option)
    for key in ("items", "additionalProperties"):
        yield from _nodes(schema.get(key))


def _check_references(tool_name: str, schema: Any, definitions: Mapping[str, Any]) -> None:
    for node in _nodes(schema):
        reference = node.get("$ref", "#")
        is_known = reference == "#" or (
            reference.startswith("#/$defs/") and reference.rsplit("/", 1)[-1] in definitions
        )
        if not is_known:
            raise ConfigError(
                f"the schema of the tool {tool_name!r} refers to {reference!r}, which it does "
                'not define; put the definition under "$defs"'
            )
