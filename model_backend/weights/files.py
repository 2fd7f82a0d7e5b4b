"""Safetensors files read and written one tensor at a time, so that memory is that of one tensor.

write_tensors(path, what, values)   header first, then each value at its place, as it is made
read_tensor(info)                   the bytes of one tensor, by seek and read: nothing is mapped
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.weights.headers import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from swarm_sdk.model_backend.weights.headers import TensorInfo
    from swarm_sdk.model_backend.weights.layout import StoredTensor

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own.

    Raises:
        ConfigError: the file cannot be read, or ends before the tensor does.
    """
    data = bytearray(info.num_bytes)
    try:
        with info.file.open("rb") as file:
            file.seek(info.begin)
            num_read = file.readinto(data)
    except OSError as error:
        raise ConfigError(f"{info.file} cannot be read: {error.strerror}") from None
    if num_read != info.num_bytes:
        raise ConfigError(f"{info.file} is damaged: it ends inside {info.name}")
    dtype = DTYPES[info.dtype]
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def write_tensors(
    path: Path, what: Sequence[StoredTensor], values: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file of the tensors ``what``, whose values come in any order.

    A write that breaks off leaves ``NAME.partial`` and no file under the real name.
    """
    # Wide types first, so that every tensor begins at a multiple of its item's bytes.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    data_bytes = 0
    for tensor in sorted(what, key=lambda tensor: -ITEM_BYTES[tensor.dtype]):
        begins[tensor.name] = data_bytes
        data_bytes += tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begins[tensor.name], data_bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    declared = {tensor.name: tensor for tensor in what}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, value in values:
            tensor = declared.pop(name)
            assert tuple(value.shape) == tensor.shape, name
            assert DTYPE_NAMES[value.dtype] == tensor.dtype, name
            file.seek(8 + len(text) + begins[name])
            if tensor.num_bytes:
                file.write(
                    value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                )
        assert not declared, f"no value for {next(iter(declared))}"
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
