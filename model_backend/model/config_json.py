"""Reading ``config.json`` into dataclasses: every mistake is one sentence that names the field."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from swarm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

RecordT = TypeVar("RecordT")


def read_json(path: Path) -> Mapping[str, Any]:
    """Read ``config.json``, given its path or its folder.

    Raises:
        ConfigError: the file is missing, cannot be read or holds no JSON object.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no model at {path.parent}: {path.name} is missing") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold one JSON object")
    return data


def section(data: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    """Return the object under ``name``.

    Raises:
        ConfigError: there is none.
    """
    found = data.get(name)
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json has no {prefix}{name} section")
    return found


def check_constants(data: Mapping[str, Any], constants: Mapping[str, Any], prefix: str) -> None:
    """Check that ``data`` does not contradict ``constants``; missing entries are fine.

    Raises:
        ConfigError: an entry has another value.
    """
    for name, wanted in constants.items():
        if name in data and data[name] != wanted:
            raise ConfigError(
                f"config.json: {prefix}.{name} is {data[name]!r}; this network has {wanted!r}"
            )


def fill(cls: type[RecordT], data: Mapping[str, Any], prefix: str) -> RecordT:
    """Build the dataclass ``cls`` from the entries of ``data`` that it has fields for.

    Raises:
        ConfigError: an entry without default is missing, or has the wrong type.
    """
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in data:
            values[field.name] = _typed(data[field.name], hints[field.name], prefix + field.name)
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"config.json has no {prefix}{field.name}")
    return cls(**values)


def _typed(value: Any, hint: Any, name: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value):
        if hint is float:
            return float(value)
        if hint is int and value == int(value):
            return int(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_typed(item, int, name) for item in value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, hint):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"config.json: {name} must be of the type {wanted}, got {value!r}")
