"""What the files of a checkpoint hold: the name table, as it is stored.

CheckpointTensor (a matrix of an expert) -> NAME.weight                             bf16, f32
                                         -> NAME.weight_packed, _scale, _shape      INT4
CheckpointTensor (any other)             -> NAME.weight                             always
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.weights.headers import ITEM_BYTES, WEIGHTS_FILE
from swarm_sdk.model_backend.weights.names import CheckpointTensor, checkpoint_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from swarm_sdk.model_backend.model.config import KimiConfig

MAX_SHARD_BYTES = 4 * 2**30
GROUP = 32
"""Numbers of one row that share a scale in INT4."""
CODES_PER_WORD = 8
"""INT4 numbers in one int32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a file, and the tensor of the network that it is, or is a part of."""

    name: str
    dtype: str
    """As safetensors names it: ``BF16``, ``F32``, ``I32``."""
    shape: tuple[int, ...]
    of: CheckpointTensor

    @property
    def num_bytes(self) -> int:
        """Bytes that its numbers take."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def stored_tensors(
    config: KimiConfig, *, dtype: str = "BF16", int4: bool = False
) -> Iterator[StoredTensor]:
    """List what the files of a checkpoint hold, in the order of the network.

    Raises:
        ConfigError: ``int4`` is asked for and the experts' widths are no multiples of 32.
    """
    for tensor in checkpoint_tensors(config):
        if int4 and tensor.is_routed_expert:
            yield from _packed(tensor)
        else:
            stored_dtype = "F32" if tensor.is_float32 else dtype
            yield StoredTensor(name=tensor.name, dtype=stored_dtype, shape=tensor.shape, of=tensor)


def shards(
    tensors: Iterable[StoredTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[StoredTensor]]:
    """Cut into files of at most ``max_shard_bytes`` (or one tensor), by the name of the file.

    The parts of one matrix stay together.
    """
    cut: list[list[StoredTensor]] = [[]]
    num_bytes = 0
    for parts in _by_matrix(tensors):
        size = sum(part.num_bytes for part in parts)
        if cut[-1] and num_bytes + size > max_shard_bytes:
            cut.append([])
            num_bytes = 0
        cut[-1] += parts
        num_bytes += size
    if len(cut) == 1:
        return {WEIGHTS_FILE: cut[0]}
    return {
        f"model-{number:05d}-of-{len(cut):05d}.safetensors": shard
        for number, shard in enumerate(cut, start=1)
    }


def index_of(files: dict[str, list[StoredTensor]]) -> dict[str, object] | None:
    """Return the content of ``model.safetensors.index.json``; ``None`` for a single file."""
    if len(files) == 1:
        return None
    total = sum(tensor.num_bytes for shard in files.values() for tensor in shard)
    weight_map = {tensor.name: file for file, shard in files.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _packed(tensor: CheckpointTensor) -> Sequence[StoredTensor]:
    rows, columns = tensor.shape
    if columns % GROUP:
        raise ConfigError(
            f"{tensor.name} has {columns} columns; INT4 needs a multiple of {GROUP} "
            "(hidden_size and moe_intermediate_size)"
        )
    kinds = {
        "packed": ("I32", (rows, columns // CODES_PER_WORD)),
        "scale": ("BF16", (rows, columns // GROUP)),
        "shape": ("I32", (2,)),
    }
    return [
        StoredTensor(name=f"{tensor.name}_{kind}", dtype=dtype, shape=shape, of=tensor)
        for kind, (dtype, shape) in kinds.items()
    ]


def _by_matrix(tensors: Iterable[StoredTensor]) -> Iterator[list[StoredTensor]]:
    parts: list[StoredTensor] = []
    for tensor in tensors:
        if parts and parts[0].of is not tensor.of:
            yield parts
            parts = []
        parts.append(tensor)
    if parts:
        yield parts
