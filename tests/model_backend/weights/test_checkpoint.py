import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights.checkpoint import load, save

EXPERT = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"


def states_are_equal(a: KimiModel, b: KimiModel) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name_a == name_b and torch.equal(x, y) for (name_a, x), (name_b, y) in pairs)


@pytest.fixture
def folder(tiny_model: KimiModel, tmp_path: Path) -> Path:
    save(tiny_model, tmp_path)
    return tmp_path


def test_what_is_saved_is_what_is_loaded(tiny_model: KimiModel, folder: Path) -> None:
    loaded = load(folder)
    assert states_are_equal(tiny_model, loaded)
    assert not loaded.training
    assert loaded.config == tiny()


def test_several_files_hold_the_same_model(tiny_model: KimiModel, tmp_path: Path) -> None:
    save(tiny_model, tmp_path, max_shard_bytes=300_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert not (tmp_path / "model.safetensors").exists()
    assert states_are_equal(tiny_model, load(tmp_path))


def test_saving_one_file_over_several_leaves_none_of_them(
    tiny_model: KimiModel, tmp_path: Path
) -> None:
    save(tiny_model, tmp_path, max_shard_bytes=300_000)
    save(tiny_model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_bf16_keeps_the_correction_bias_in_float32(tiny_model: KimiModel, tmp_path: Path) -> None:
    save(tiny_model, tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    is_bias = {name: name.endswith("e_score_correction_bias") for name in tensors}
    assert all(
        tensors[n].dtype == (torch.float32 if is_bias[n] else torch.bfloat16) for n in tensors
    )
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load(tmp_path, dtype=torch.bfloat16)
    assert loaded.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    assert loaded.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    again = tmp_path / "again"
    save(loaded, again)
    assert states_are_equal(loaded, load(again, dtype=torch.bfloat16))


def test_generation_stops_at_the_end_of_the_turn(folder: Path) -> None:
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [512 - 256 + 2, tiny().eos_token_id]


def test_transformers_finds_every_tensor(parity: ModuleType, folder: Path) -> None:
    reference = parity.load_reference(folder)
    expert = load_file(folder / "model.safetensors")[EXPERT]
    stack = reference.model.language_model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(stack[3, 32:], expert)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, f"has no tensor {EXPERT}"),
        (torch.zeros(3, 4), r"has the shape \[3, 4\], config.json asks for \[32, 64\]"),
        (torch.zeros(32, 64, dtype=torch.int32), "holds I32, not BF16"),
    ],
    ids=["missing", "misshapen", "integers"],
)
def test_a_wrong_tensor_is_named_with_its_file(
    folder: Path, value: torch.Tensor | None, message: str
) -> None:
    rewrite(folder, {EXPERT: value})
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert EXPERT in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_a_cut_off_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        load(folder)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        load(folder)


def test_a_missing_file_is_named(tiny_model: KimiModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load(tmp_path)
    save(tiny_model, tmp_path, max_shard_bytes=300_000)
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name} is missing"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_broken_index_is_named(tiny_model: KimiModel, tmp_path: Path, content: str) -> None:
    save(tiny_model, tmp_path, max_shard_bytes=300_000)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model.safetensors.index.json"):
        load(tmp_path)
