"""The shape of a K2.5 model, read from and written to the Hugging Face ``config.json``.

    KimiConfig
    ├── text_config    TextConfig      MLA + mixture-of-experts decoder, rope_scaling: YarnConfig
    ├── vision_config  VisionConfig    MoonViT-3D and its projector
    └── token ids      bos, eos, pad, media placeholder

``k25()`` holds the values of the released checkpoint, ``nano()`` those of the model inside this
package, ``tiny()`` the smallest that still has every part. Field names are those of Hugging Face.
Fields of ``config.json`` that have one possible value here (``scoring_func`` …) are written by
``to_hf`` and checked by ``from_hf``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config_json import check_constants, fill, read_json, section

NUM_SPECIAL_TOKENS = 256
K25_FIRST_SPECIAL_ID = 163584

_TEXT_CONSTANTS: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_VISION_CONSTANTS: dict[str, Any] = {
    "pos_emb_type": "divided_fixed",
    "video_attn_type": "spatial_temporal",
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "projector_hidden_act": "gelu",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """How rotary frequencies are stretched beyond the length of pre-training (YaRN)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def scale(self, mscale: float) -> float:
        """Return the magnitude that attention logits gain; 1 for a factor of at most 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The decoder: multi-head latent attention and a mixture of experts."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    """Number of first layers with a dense MLP; all later layers hold experts."""
    intermediate_size: int
    """Inner width of the dense MLP."""
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    rope_scaling: YarnConfig
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _require_positive(self, "text_config", zero_allowed="first_k_dense_replace")
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "q_lora_rank", "kv_lora_rank"):
            if getattr(self, name) % 2:
                raise ConfigError(f"text_config.{name} must be even: channels rotate in pairs")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"text_config.num_experts_per_tok ({self.num_experts_per_tok}) must be at most "
                f"n_routed_experts ({self.n_routed_experts})"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of the attention logits: ``qk_head_dim**-0.5 * mscale**2``."""
        mscale = self.rope_scaling.scale(self.rope_scaling.mscale_all_dim)
        return float(self.qk_head_dim**-0.5 * mscale * mscale)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """MoonViT-3D and the projector into the text model."""

    vt_hidden_size: int
    vt_num_hidden_layers: int
    vt_num_attention_heads: int
    vt_intermediate_size: int
    text_hidden_size: int
    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64
    init_pos_emb_time: int = 4
    patch_size: int = 14
    merge_kernel_size: tuple[int, int] = (2, 2)
    projector_ln_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require_positive(self, "vision_config")
        if self.vt_hidden_size % (4 * self.vt_num_attention_heads):
            raise ConfigError(
                f"vision_config.vt_hidden_size ({self.vt_hidden_size}) must be a multiple of 4 x "
                f"vt_num_attention_heads ({self.vt_num_attention_heads}): each head rotates by two "
                "coordinates"
            )

    @property
    def num_merged_patches(self) -> int:
        """Patches of one frame that make one token."""
        return self.merge_kernel_size[0] * self.merge_kernel_size[1]

    @property
    def projector_size(self) -> int:
        """Width of the merged patches inside the projector."""
        return self.vt_hidden_size * self.num_merged_patches


@dataclass(frozen=True, kw_only=True, slots=True)
class KimiConfig:
    """A whole model: text, vision and the token ids that the network itself knows."""

    text_config: TextConfig
    vision_config: VisionConfig
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    media_placeholder_token_id: int

    def __post_init__(self) -> None:
        if self.vision_config.text_hidden_size != self.text_config.hidden_size:
            raise ConfigError(
                f"vision_config.text_hidden_size ({self.vision_config.text_hidden_size}) must "
                f"equal text_config.hidden_size ({self.text_config.hidden_size})"
            )
        for name in ("bos", "eos", "pad", "media_placeholder"):
            token_id = getattr(self, f"{name}_token_id")
            if not 0 <= token_id < self.text_config.vocab_size:
                raise ConfigError(
                    f"{name}_token_id ({token_id}) is outside the vocabulary of "
                    f"{self.text_config.vocab_size} tokens"
                )

    @staticmethod
    def from_hf(source: str | Path | Mapping[str, Any]) -> KimiConfig:
        """Read ``config.json``: its path, the folder that holds it, or its parsed content.

        Raises:
            ConfigError: the file is missing or is no JSON, or describes a model that this
                network cannot be; names the field.
        """
        data = source if isinstance(source, Mapping) else read_json(Path(source))
        if data.get("model_type") != "kimi_k25":
            raise ConfigError(
                f"config.json has model_type {data.get('model_type')!r}; "
                "this network loads 'kimi_k25' checkpoints"
            )
        text, vision = section(data, "text_config"), section(data, "vision_config")
        check_constants(text, _TEXT_CONSTANTS, "text_config")
        check_constants(vision, _VISION_CONSTANTS, "vision_config")
        yarn = section(text, "rope_scaling", "text_config.")
        if yarn.get("rope_type", yarn.get("type")) != "yarn":
            raise ConfigError("text_config.rope_scaling must have the type 'yarn'")
        return fill(
            KimiConfig,
            {
                **data,
                "text_config": fill(
                    TextConfig,
                    {
                        **text,
                        "rope_scaling": fill(YarnConfig, yarn, "text_config.rope_scaling."),
                    },
                    "text_config.",
                ),
                "vision_config": fill(VisionConfig, vision, "vision_config."),
            },
            "",
        )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the content of ``config.json``, as ``transformers`` and SGLang read it too.

        ``vision_config`` and the top level carry some values twice, because the hub's names
        (``vt_hidden_size``), SGLang's (``hidden_size``) and transformers' (``pos_emb_height``,
        ``image_token_id``) differ.
        """
        text, vision = self.text_config, self.vision_config
        token_ids = {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        yarn = {"type": "yarn", "rope_type": "yarn", **dataclasses.asdict(text.rope_scaling)}
        return {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": "kimi_k25",
            "dtype": dtype,
            **token_ids,
            "media_placeholder_token_id": self.media_placeholder_token_id,
            "image_token_id": self.media_placeholder_token_id,
            "ignore_index": -100,
            "tie_word_embeddings": False,
            "use_unified_vision_chunk": True,
            "video_placeholder": "<|kimi_k25_video_placeholder|>",
            "projection_hidden_size": vision.vt_hidden_size,
            "projection_layer_norm_eps": vision.projector_ln_eps,
            "text_config": {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "kimi_k2",
                "dtype": dtype,
                **token_ids,
                **dataclasses.asdict(text),
                **_TEXT_CONSTANTS,
                "rope_scaling": yarn,
                "num_key_value_heads": text.num_attention_heads,
                "attention_dropout": 0.0,
                "aux_loss_alpha": 0.001,
                "seq_aux": True,
                "ep_size": 1,
                "pretraining_tp": 1,
                "use_cache": True,
            },
            "vision_config": {
                "model_type": "kimi_k25_vision",
                **dataclasses.asdict(vision),
                **_VISION_CONSTANTS,
                "merge_kernel_size": list(vision.merge_kernel_size),
                "mm_hidden_size": vision.vt_hidden_size,
                "hidden_size": vision.vt_hidden_size,
                "num_hidden_layers": vision.vt_num_hidden_layers,
                "num_attention_heads": vision.vt_num_attention_heads,
                "intermediate_size": vision.vt_intermediate_size,
                "pos_emb_height": vision.init_pos_emb_height,
                "pos_emb_width": vision.init_pos_emb_width,
                "pos_emb_time": vision.init_pos_emb_time,
            },
        }


def special_token_id(k25_id: int, vocab_size: int) -> int:
    """Return the id of a K2.5 special token where the last 256 of ``vocab_size`` ids are special.

    >>> special_token_id(163586, vocab_size=4096)
    3842
    """
    return vocab_size - NUM_SPECIAL_TOKENS + (k25_id - K25_FIRST_SPECIAL_ID)


def k25() -> KimiConfig:
    """Return Kimi K2.5 as released (1.03 T parameters in the text model, 32 B active)."""
    text = TextConfig(
        vocab_size=163840,
        hidden_size=7168,
        num_hidden_layers=61,
        first_k_dense_replace=1,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=384,
        n_shared_experts=1,
        num_experts_per_tok=8,
        routed_scaling_factor=2.827,
        num_attention_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=50000.0,
        rope_scaling=YarnConfig(factor=64.0, original_max_position_embeddings=4096),
        max_position_embeddings=262144,
    )
    vision = VisionConfig(
        vt_hidden_size=1152,
        vt_num_hidden_layers=27,
        vt_num_attention_heads=16,
        vt_intermediate_size=4304,
        text_hidden_size=7168,
    )
    return _with_token_ids(text, vision)


def nano() -> KimiConfig:
    """Return the model inside this package: 15 M parameters, 30 MB in bf16."""
    text = TextConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=7,
        first_k_dense_replace=1,
        intermediate_size=1024,
        moe_intermediate_size=128,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        routed_scaling_factor=2.827,
        num_attention_heads=8,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        rope_theta=50000.0,
        rope_scaling=YarnConfig(factor=2.0, original_max_position_embeddings=4096),
        max_position_embeddings=8192,
    )
    vision = VisionConfig(
        vt_hidden_size=64,
        vt_num_hidden_layers=2,
        vt_num_attention_heads=4,
        vt_intermediate_size=128,
        text_hidden_size=256,
        init_pos_emb_height=16,
        init_pos_emb_width=16,
    )
    return _with_token_ids(text, vision)


def tiny() -> KimiConfig:
    """Return the smallest model with every part: one dense layer, two with experts."""
    text = TextConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        routed_scaling_factor=2.827,
        num_attention_heads=4,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=24,
        rope_theta=50000.0,
        rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=256),
        max_position_embeddings=1024,
    )
    vision = VisionConfig(
        vt_hidden_size=48,
        vt_num_hidden_layers=2,
        vt_num_attention_heads=3,
        vt_intermediate_size=80,
        text_hidden_size=64,
        init_pos_emb_height=8,
        init_pos_emb_width=8,
    )
    return _with_token_ids(text, vision)


def _with_token_ids(text: TextConfig, vision: VisionConfig) -> KimiConfig:
    return KimiConfig(
        text_config=text,
        vision_config=vision,
        bos_token_id=special_token_id(163584, text.vocab_size),
        eos_token_id=special_token_id(163585, text.vocab_size),
        pad_token_id=special_token_id(163839, text.vocab_size),
        media_placeholder_token_id=special_token_id(163605, text.vocab_size),
    )


def _require_positive(config: Any, prefix: str, *, zero_allowed: str = "") -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if not isinstance(number, int | float):
                continue
            if number < 0 or (number == 0 and field.name != zero_allowed):
                raise ConfigError(f"{prefix}.{field.name} must be positive, got {number}")
