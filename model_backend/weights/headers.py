"""What safetensors files hold, read from their headers alone: no weight is touched.

    file   8 bytes: n (little-endian) | n bytes of JSON: {name: {dtype, shape, data_offsets}} | data
    folder model.safetensors, or files and model.safetensors.index.json (weight_map: name -> file)

Needs no torch, so that tools can tell what a checkpoint of a terabyte needs in a second.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm_sdk.errors import ConfigError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}
"""Bytes of one number, by the format's names of types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a file: what it is and where its bytes lie."""

    name: str
    dtype: str
    """As the format names it: ``BF16``, ``F32``, ``I32`` …"""
    shape: tuple[int, ...]
    file: Path
    begin: int
    """Offset of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes that its numbers take."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read which tensors a safetensors file holds.

    Raises:
        ConfigError: the file is missing, cut off or no safetensors file; names it.
    """
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 0 < header_bytes <= MAX_HEADER_BYTES:
                raise ValueError(f"its header would have {header_bytes} bytes")
            header = json.loads(file.read(header_bytes).decode())
        data_begin = 8 + header_bytes
        tensors = {
            name: _info(name, entry, path, data_begin)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        _check_no_holes(tensors, data_begin, path.stat().st_size)
    except FileNotFoundError:
        raise ConfigError(f"the checkpoint file {path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or no safetensors file: {error}") from None
    return tensors


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Read which tensors all files of a checkpoint folder hold, in the order of the files.

    Raises:
        ConfigError: a file is missing or damaged, or the index and the files do not tell the same;
            names the file.
    """
    if not folder.is_dir():
        raise ConfigError(f"no model at {folder}: there is no such folder")
    file_of = weight_map(folder)
    if file_of is None:
        return read_header(folder / WEIGHTS_FILE)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(file_of.values())):
        tensors |= read_header(folder / file)
    for name, file in file_of.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ConfigError(f"{folder / file} has no tensor {name}, though {INDEX_FILE} says so")
    for name, info in tensors.items():
        if name not in file_of:
            raise ConfigError(f"{info.file} holds {name}, which {INDEX_FILE} does not list")
    return tensors


def weight_map(folder: Path) -> dict[str, str] | None:
    """Read the file of each tensor, or give ``None`` for a checkpoint of a single file.

    Raises:
        ConfigError: the index is damaged.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(Path(file).name) for name, file in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is damaged: it must hold a JSON object 'weight_map'") from None


def _info(name: str, entry: dict[str, Any], path: Path, data_begin: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"{name} has the unknown type {entry['dtype']}")
    info = TensorInfo(
        name=name, dtype=entry["dtype"], shape=shape, file=path, begin=data_begin + int(begin)
    )
    if min(shape, default=1) < 0 or end - begin != info.num_bytes:
        raise ValueError(f"{name} has {end - begin} bytes, its shape says {info.num_bytes}")
    return info


def _check_no_holes(tensors: dict[str, TensorInfo], data_begin: int, file_bytes: int) -> None:
    place = data_begin
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.num_bytes)):
        if info.begin != place:
            raise ValueError(f"{info.name} begins at byte {info.begin}, not at {place}")
        place += info.num_bytes
    if place != file_bytes:
        raise ValueError(f"the file has {file_bytes} bytes, its header says {place}")
