"""Checkpoints in the Hugging Face layout, which ``transformers`` and SGLang load unchanged.

config.json
generation_config.json           the end-of-turn token as the stop token
model.safetensors                or several model-0000N-of-0000M.safetensors and
model.safetensors.index.json     the index of which tensor is in which file

The routed experts are bf16 (or the model's own type), or INT4 as in the released checkpoint
(``int4.py``). A model is always read dequantised.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import KimiConfig, special_token_id
from swarm_sdk.model_backend.model.config_json import read_json
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights import int4
from swarm_sdk.model_backend.weights.check import FLOAT_TYPES, check_tensor
from swarm_sdk.model_backend.weights.files import DTYPE_NAMES, read_tensor, write_tensors
from swarm_sdk.model_backend.weights.headers import (
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorInfo,
    read_header,
    weight_map,
)
from swarm_sdk.model_backend.weights.layout import (
    CODES_PER_WORD,
    GROUP,
    MAX_SHARD_BYTES,
    StoredTensor,
    index_of,
    shards,
    stored_tensors,
)
from swarm_sdk.model_backend.weights.quantization import is_int4 as has_int4_experts
from swarm_sdk.model_backend.weights.quantization import with_quantization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

K25_IM_END_ID = 163586


def save(
    model: KimiModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    is_int4: bool = False,
) -> None:
    """Write the checkpoint into ``folder``, which is made if it does not exist.

    ``dtype`` is that of the written weights (``None``: the model's own); the router's correction
    bias stays float32. With ``is_int4`` the routed experts are INT4 and the rest is bf16.

    Raises:
        ConfigError: INT4 is asked for and the experts' widths are no multiples of 32.
    """
    folder = Path(folder)
    config = model.config
    dtype = torch.bfloat16 if is_int4 else dtype or model.embed_tokens.weight.dtype
    stored = stored_tensors(config, dtype=DTYPE_NAMES[dtype], int4=is_int4)
    files = shards(stored, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    im_end = special_token_id(K25_IM_END_ID, config.text_config.vocab_size)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": [im_end, config.eos_token_id],
        "pad_token_id": config.pad_token_id,
        "max_length": config.text_config.max_position_embeddings,
    }
    described = config.to_hf(str(dtype).removeprefix("torch."))
    write_json(folder / "config.json", with_quantization(described, int4=is_int4))
    write_json(folder / "generation_config.json", generation)
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / INDEX_FILE):
        stale.unlink(missing_ok=True)
    if WEIGHTS_FILE not in files:
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    state = model.state_dict()
    for file, shard in files.items():
        write_tensors(folder / file, shard, _values(shard, state, dtype))
    if index := index_of(files):
        write_json(folder / INDEX_FILE, index)


def load(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> KimiModel:
    """Read a checkpoint; the model is in evaluation mode. INT4 experts are dequantised (to bf16).

    Raises:
        ConfigError: the folder, a file or a tensor is missing, damaged or of another shape than
            ``config.json`` says; names the file and the tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no model at {folder}: there is no such folder")
    config = KimiConfig.from_hf(folder)
    is_int4 = has_int4_experts(read_json(folder))
    with torch.device("meta"):
        model = KimiModel(config)
    state = {
        name: torch.empty(
            tensor.shape,
            dtype=torch.float32 if tensor.dtype == torch.float32 and _is_bias(name) else dtype,
            device=device,
        )
        for name, tensor in model.state_dict().items()
    }
    find = _finder(folder)
    with torch.no_grad():
        for stored in stored_tensors(config, int4=is_int4):
            tensor = stored.of
            if stored.name == tensor.name:
                info = find(stored.name)
                check_tensor(info, stored.shape, FLOAT_TYPES)
                value = read_tensor(info)
            elif stored.name.endswith("_packed"):
                value = int4.dequantize(read_int4(tensor.name, tensor.shape, find))
            else:
                continue  # read together with the packed words
            tensor.part_of(state[tensor.parameter]).copy_(value)
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_int4(
    name: str, shape: tuple[int, ...], find: Callable[[str], TensorInfo]
) -> int4.Int4Weight:
    """Read the three parts of the INT4 matrix ``name``, which must have this ``shape``.

    Raises:
        ConfigError: a part is missing, misshapen, of another type, or holds a scale that is not
            finite; names the file.
    """
    rows, columns = shape
    parts = {part: find(f"{name}_{part}") for part in ("packed", "scale", "shape")}
    for part, wanted, dtypes in (
        ("packed", (rows, columns // CODES_PER_WORD), ("I32",)),
        ("scale", (rows, columns // GROUP), ("BF16",)),
        ("shape", (2,), ("I32", "I64")),
    ):
        check_tensor(parts[part], wanted, dtypes)
    told = tuple(read_tensor(parts["shape"]).tolist())
    if told != (rows, columns):
        raise ConfigError(
            f"{parts['shape'].file}: {name}_shape says {list(told)}, config.json asks for "
            f"{[rows, columns]}"
        )
    scale = read_tensor(parts["scale"])
    if not scale.isfinite().all():
        raise ConfigError(f"{parts['scale'].file} is damaged: {name}_scale is not finite")
    return int4.Int4Weight(read_tensor(parts["packed"]), scale)


def write_json(path: Path, content: object) -> None:
    """Write an object as indented JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _is_bias(name: str) -> bool:
    return name.endswith("e_score_correction_bias")


def _finder(folder: Path) -> Callable[[str], TensorInfo]:
    """Give a function that finds a tensor by its name; headers are read as they are needed."""
    file_of = weight_map(folder)
    headers: dict[str, dict[str, TensorInfo]] = {}

    def find(name: str) -> TensorInfo:
        file = WEIGHTS_FILE if file_of is None else file_of.get(name, "")
        if not file:
            raise ConfigError(f"{folder / INDEX_FILE} does not list the tensor {name}")
        if file not in headers:
            headers[file] = read_header(folder / file)
        if name not in headers[file]:
            raise ConfigError(f"{folder / file} has no tensor {name}")
        return headers[file][name]

    return find


def _values(
    shard: Iterable[StoredTensor], state: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for stored in shard:
        tensor = stored.of
        if stored.name == tensor.name:
            value = tensor.part_of(state[tensor.parameter]).detach().cpu()
            yield stored.name, value.to(torch.float32 if tensor.is_float32 else dtype)
        elif stored.name.endswith("_packed"):
            value = tensor.part_of(state[tensor.parameter]).detach()
            yield from int4_parts(tensor.name, int4.quantize(value))


def int4_parts(name: str, weight: int4.Int4Weight) -> Iterator[tuple[str, Tensor]]:
    """Give the three tensors of a checkpoint that hold one INT4 matrix."""
    yield f"{name}_packed", weight.packed
    yield f"{name}_scale", weight.scale
    yield f"{name}_shape", torch.tensor(weight.shape, dtype=torch.int32)
