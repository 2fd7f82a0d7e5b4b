import doctest
import json
from pathlib import Path

import pytest
from transformers import Kimi_K25Config

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model import config as config_module
from swarm_sdk.model_backend.model import media
from swarm_sdk.model_backend.model.config import KimiConfig, k25, nano, special_token_id, tiny


@pytest.mark.parametrize("config", [k25(), nano(), tiny()], ids=["k25", "nano", "tiny"])
def test_a_config_survives_the_way_through_config_json(config: KimiConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert KimiConfig.from_hf(tmp_path) == config
    assert KimiConfig.from_hf(tmp_path / "config.json") == config
    assert KimiConfig.from_hf(config.to_hf()) == config


def test_k25_has_the_released_values() -> None:
    data = k25().to_hf()
    assert data["architectures"] == ["KimiK25ForConditionalGeneration"]
    ids = {name: data[name] for name in data if name.endswith("token_id")}
    assert ids == {
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "pad_token_id": 163839,
        "media_placeholder_token_id": 163605,
        "image_token_id": 163605,
    }
    assert data["text_config"]["model_type"] == "kimi_k2"
    assert data["text_config"]["rope_scaling"]["factor"] == 64.0
    assert data["vision_config"]["vt_hidden_size"] == 1152
    assert k25().text_config.softmax_scale == pytest.approx(0.14468, abs=1e-5)


def test_transformers_reads_the_same_sizes() -> None:
    config = tiny()
    theirs = Kimi_K25Config(**config.to_hf())
    assert theirs.tie_word_embeddings is False
    assert theirs.image_token_id == config.media_placeholder_token_id
    assert theirs.projection_hidden_size == config.vision_config.vt_hidden_size
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        assert getattr(theirs.vision_config, name) == getattr(config.vision_config, f"vt_{name}")
    for name in ("height", "width", "time"):
        ours = getattr(config.vision_config, f"init_pos_emb_{name}")
        assert getattr(theirs.vision_config, f"pos_emb_{name}") == ours
    assert theirs.text_config.rope_parameters["rope_theta"] == config.text_config.rope_theta
    assert theirs.text_config.kv_lora_rank == config.text_config.kv_lora_rank


def test_special_tokens_are_the_last_256_ids() -> None:
    assert special_token_id(163584, vocab_size=4096) == 3840
    assert special_token_id(163839, vocab_size=4096) == 4095
    assert nano().media_placeholder_token_id == 3861


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("", "model_type", "llama", "'llama'"),
        ("", "text_config", None, "no text_config section"),
        ("", "media_placeholder_token_id", 512, "outside the vocabulary"),
        ("text_config", "hidden_size", "64", "text_config.hidden_size must be of the type int"),
        ("text_config", "hidden_size", float("inf"), "hidden_size must be of the type int"),
        ("text_config", "hidden_size", 64.5, "hidden_size must be of the type int"),
        ("text_config", "hidden_size", True, "hidden_size must be of the type int"),
        ("text_config", "hidden_size", 0, "text_config.hidden_size must be positive"),
        (
            "text_config",
            "rms_norm_eps",
            float("nan"),
            "text_config.rms_norm_eps must be of the type float",
        ),
        ("text_config", "num_experts_per_tok", 9, "at most n_routed_experts"),
        ("text_config", "qk_rope_head_dim", 7, "must be even"),
        ("text_config", "scoring_func", "softmax", "text_config.scoring_func is 'softmax'"),
        ("text_config", "n_group", 8, "text_config.n_group is 8"),
        ("text_config", "rope_scaling", {"type": "linear"}, "'yarn'"),
        ("text_config", "rope_scaling", None, "text_config.rope_scaling section"),
        ("vision_config", "text_hidden_size", 65, "must equal text_config.hidden_size"),
        ("vision_config", "vt_hidden_size", 50, "must be a multiple of 4"),
        ("vision_config", "merge_kernel_size", [2], "vision_config.merge_kernel_size"),
        ("vision_config", "pos_emb_type", "learned", "vision_config.pos_emb_type"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_field(
    section: str, field: str, value: object, message: str
) -> None:
    data = tiny().to_hf()
    (data[section] if section else data)[field] = value
    with pytest.raises(ConfigError) as caught:
        KimiConfig.from_hf(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["hidden_size", "kv_lora_rank", "rope_theta"])
def test_a_missing_field_is_named(field: str) -> None:
    data = tiny().to_hf()
    del data["text_config"][field]
    with pytest.raises(ConfigError, match=f"config.json has no text_config.{field}"):
        KimiConfig.from_hf(data)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        KimiConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        KimiConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="one JSON object"):
        KimiConfig.from_hf(tmp_path)


def test_the_examples_of_the_docstrings_are_right() -> None:
    assert doctest.testmod(config_module).failed == 0
    assert doctest.testmod(media).failed == 0
