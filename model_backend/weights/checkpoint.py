"""Checkpoints in the Hugging Face layout, which ``transformers`` and SGLang load unchanged.

config.json
generation_config.json           the end-of-turn token as the stop token
model.safetensors                or several model-0000N-of-0000M.safetensors and
model.safetensors.index.json     the index of which tensor is in which file
"""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import KimiConfig, special_token_id
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights.names import CheckpointTensor, checkpoint_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

K25_IM_END_ID = 163586
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30


def save(
    model: KimiModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint into ``folder``, which is made if it does not exist.

    ``dtype`` is that of the written weights (``None``: the model's own); the router's correction
    bias stays float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, dtype = model.config, dtype or model.embed_tokens.weight.dtype
    im_end = special_token_id(K25_IM_END_ID, config.text_config.vocab_size)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": [im_end, config.eos_token_id],
        "pad_token_id": config.pad_token_id,
        "max_length": config.text_config.max_position_embeddings,
    }
    _write_json(folder / "config.json", config.to_hf(str(dtype).removeprefix("torch.")))
    _write_json(folder / "generation_config.json", generation)

    shards = list(_shards(model, dtype, max_shard_bytes))
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / INDEX_FILE):
        stale.unlink(missing_ok=True)
    if len(shards) == 1:
        _write_weights(folder / WEIGHTS_FILE, model, shards[0], dtype)
        return
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_weights(folder / file, model, shard, dtype)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(_num_bytes(tensor, dtype) for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / INDEX_FILE, index)


def load(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> KimiModel:
    """Read a checkpoint; the model is in evaluation mode.

    Raises:
        ConfigError: the folder, a file or a tensor is missing, damaged or of another shape than
            ``config.json`` says; names the file and the tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no model at {folder}: there is no such folder")
    config = KimiConfig.from_hf(folder)
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
    with _open_weights(folder) as read, torch.no_grad():
        for tensor in checkpoint_tensors(config):
            tensor.part_of(state[tensor.parameter]).copy_(read(tensor))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _is_bias(name: str) -> bool:
    return name.endswith("e_score_correction_bias")


@contextmanager
def _open_weights(folder: Path) -> Iterator[Callable[[CheckpointTensor], Tensor]]:
    """Give a function that reads one tensor of the checkpoint in ``folder``."""
    file_of = _weight_map(folder)
    with ExitStack() as stack:
        opened: dict[str, Any] = {}

        def read(tensor: CheckpointTensor) -> Tensor:
            name = tensor.name
            file = file_of.get(name, "") if file_of is not None else WEIGHTS_FILE
            if not file:
                raise ConfigError(f"{folder / INDEX_FILE} does not list the tensor {name}")
            path = folder / file
            if file not in opened:
                opened[file] = stack.enter_context(_open_file(path))
            try:
                value: Tensor = opened[file].get_tensor(name)
            except SafetensorError:
                raise ConfigError(f"{path} has no tensor {name}") from None
            if tuple(value.shape) != tensor.shape:
                raise ConfigError(
                    f"{path}: {name} has the shape {list(value.shape)}, "
                    f"config.json asks for {list(tensor.shape)}"
                )
            if not value.is_floating_point():
                raise ConfigError(
                    f"{path}: {name} holds {value.dtype}, not numbers of a floating type"
                )
            return value

        yield read


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ConfigError(f"the checkpoint file {path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or no safetensors file: {error}") from None


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Read the file of each tensor, or give ``None`` for a checkpoint of a single file."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(Path(file).name) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is damaged: it must hold a JSON object 'weight_map'") from None


def _shards(
    model: KimiModel, dtype: torch.dtype, max_shard_bytes: int
) -> Iterator[list[CheckpointTensor]]:
    shard: list[CheckpointTensor] = []
    num_bytes = 0
    for tensor in checkpoint_tensors(model.config):
        size = _num_bytes(tensor, dtype)
        if shard and num_bytes + size > max_shard_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append(tensor)
        num_bytes += size
    yield shard


def _num_bytes(tensor: CheckpointTensor, dtype: torch.dtype) -> int:
    num_values = 1
    for size in tensor.shape:
        num_values *= size
    return num_values * (4 if tensor.is_float32 else dtype.itemsize)


def _write_weights(
    path: Path, model: KimiModel, shard: list[CheckpointTensor], dtype: torch.dtype
) -> None:
    state = model.state_dict()
    values = {
        tensor.name: tensor.part_of(state[tensor.parameter])
        .detach()
        .to(device="cpu", dtype=torch.float32 if tensor.is_float32 else dtype, copy=True)
        .contiguous()
        for tensor in shard
    }
    partial = path.with_suffix(".partial")
    save_file(values, partial, metadata={"format": "pt"})
    partial.replace(path)  # a broken-off write leaves no half checkpoint under the real name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
