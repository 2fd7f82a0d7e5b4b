"""Whether a checkpoint holds what its ``config.json`` asks for, by its headers; needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.weights.layout import stored_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from swarm_sdk.model_backend.model.config import KimiConfig
    from swarm_sdk.model_backend.weights.headers import TensorInfo

FLOAT_TYPES = ("BF16", "F32", "F16")


def check_complete(
    headers: dict[str, TensorInfo], config: KimiConfig, source: Path, *, is_int4: bool
) -> None:
    """Check that a checkpoint holds every tensor of the network, and none besides.

    Raises:
        ConfigError: one is missing, misshapen, of another type or not the network's; names it and
            its file.
    """
    wanted = {tensor.name: tensor for tensor in stored_tensors(config, int4=is_int4)}
    missing = [name for name in wanted if name not in headers]
    if missing:
        raise ConfigError(
            f"{source} lacks {len(missing)} of the {len(wanted)} tensors that config.json asks "
            f"for, the first is {missing[0]}; copy the checkpoint again"
        )
    for name, info in headers.items():
        if name not in wanted:
            raise ConfigError(
                f"{info.file} holds {name}, which the network of config.json does not have; "
                f"{len(headers) - len(wanted)} tensors are too many"
            )
        tensor = wanted[name]
        types = {"I32": ("I32", "I64") if name.endswith("_shape") else ("I32",)}
        is_scale = name.endswith("weight_scale")
        check_tensor(
            info,
            tensor.shape,
            types.get(tensor.dtype, ("BF16",) if is_scale else FLOAT_TYPES),
        )


def check_tensor(info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Check that a tensor of a file is what ``config.json`` asks for.

    Raises:
        ConfigError: it is of another shape or type; names the file and the tensor.
    """
    if info.shape != shape:
        raise ConfigError(
            f"{info.file}: {info.name} has the shape {list(info.shape)}, "
            f"config.json asks for {list(shape)}"
        )
    if info.dtype not in dtypes:
        raise ConfigError(f"{info.file}: {info.name} holds {info.dtype}, not {' or '.join(dtypes)}")
