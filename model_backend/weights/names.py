"""The name table: which tensor of a checkpoint is which part of which parameter.

    checkpoint (Hugging Face)                            this network
    language_model.model.layers.3.self_attn.q_a_proj ┐
    … .self_attn.kv_a_proj_with_mqa                  ┴─> layers.3.self_attn.qkv_a_proj   (rows)
    … .mlp.experts.5.gate_proj ┐
    … .mlp.experts.5.up_proj   ┴───────────────────────> layers.3.mlp.experts.gate_up_proj[5]
    vision_tower.*, mm_projector.*                       the same names

The names are those of the released checkpoint, so ``transformers`` and SGLang load what is saved.
Code that must treat joined matrices apart (an optimiser that orthogonalises) reads the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from swarm_sdk.model_backend.model.config import KimiConfig, TextConfig, VisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointTensor:
    """One tensor of a checkpoint and the part of a parameter that it fills."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    parameter: str
    """Name in ``KimiModel.state_dict()``."""
    expert: int | None = None
    """Index into the stack of experts; ``None`` where the parameter is no stack."""
    first_row: int | None = None
    """Where its rows start in a matrix that joins several; ``None`` where it is the whole."""
    is_float32: bool = False
    """Whether it stays float32 in a checkpoint of lower precision."""

    @property
    def is_routed_expert(self) -> bool:
        """Whether it is a matrix of a routed expert: what INT4 checkpoints quantise."""
        return self.expert is not None

    def part_of(self, parameter: Tensor) -> Tensor:
        """Return the view of ``parameter`` that this tensor fills."""
        part = parameter if self.expert is None else parameter[self.expert]
        if self.first_row is None:
            return part
        return part[self.first_row : self.first_row + self.shape[0]]


def checkpoint_tensors(config: KimiConfig) -> Iterator[CheckpointTensor]:
    """List every tensor of the model's checkpoint, in the order of the network."""
    text = config.text_config
    embed_shape = (text.vocab_size, text.hidden_size)
    yield _text("model.embed_tokens.weight", embed_shape, "embed_tokens.weight")
    for layer_index in range(text.num_hidden_layers):
        yield from _layer(text, layer_index)
    yield _text("model.norm.weight", (text.hidden_size,), "norm.weight")
    yield _text("lm_head.weight", embed_shape, "lm_head.weight")
    for name, shape in _vision(config.vision_config):
        yield CheckpointTensor(name=name, shape=shape, parameter=name)


def _text(
    name: str,
    shape: tuple[int, ...],
    parameter: str,
    *,
    expert: int | None = None,
    first_row: int | None = None,
    is_float32: bool = False,
) -> CheckpointTensor:
    return CheckpointTensor(
        name=f"language_model.{name}",
        shape=shape,
        parameter=parameter,
        expert=expert,
        first_row=first_row,
        is_float32=is_float32,
    )


def _layer(text: TextConfig, layer_index: int) -> Iterator[CheckpointTensor]:
    layer, hidden = f"layers.{layer_index}", text.hidden_size
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _text(f"model.{layer}.{name}.weight", (hidden,), f"{layer}.{name}.weight")
    yield from _attention(text, f"{layer}.self_attn")
    mlp = f"{layer}.mlp"
    if layer_index < text.first_k_dense_replace:
        yield from _swiglu(mlp, mlp, hidden, text.intermediate_size)
        return
    num_experts, inner = text.n_routed_experts, text.moe_intermediate_size
    yield _text(f"model.{mlp}.gate.weight", (num_experts, hidden), f"{mlp}.gate.weight")
    bias = f"{mlp}.gate.e_score_correction_bias"
    yield _text(f"model.{bias}", (num_experts,), bias, is_float32=True)
    shared = f"{mlp}.shared_experts"
    yield from _swiglu(shared, shared, hidden, inner * text.n_shared_experts)
    for expert in range(num_experts):
        yield from _swiglu(f"{mlp}.experts.{expert}", f"{mlp}.experts", hidden, inner, expert)


def _attention(text: TextConfig, attn: str) -> Iterator[CheckpointTensor]:
    hidden, heads = text.hidden_size, text.num_attention_heads
    q_rank, kv_rank = text.q_lora_rank, text.kv_lora_rank
    joined = f"{attn}.qkv_a_proj.weight"
    kv_a_shape = (kv_rank + text.qk_rope_head_dim, hidden)
    kv_b_shape = (heads * (text.qk_nope_head_dim + text.v_head_dim), kv_rank)
    yield _text(f"model.{attn}.q_a_proj.weight", (q_rank, hidden), joined, first_row=0)
    yield _text(f"model.{attn}.kv_a_proj_with_mqa.weight", kv_a_shape, joined, first_row=q_rank)
    for name, shape in (
        ("q_a_layernorm", (q_rank,)),
        ("q_b_proj", (heads * text.qk_head_dim, q_rank)),
        ("kv_a_layernorm", (kv_rank,)),
        ("kv_b_proj", kv_b_shape),
        ("o_proj", (hidden, heads * text.v_head_dim)),
    ):
        yield _text(f"model.{attn}.{name}.weight", shape, f"{attn}.{name}.weight")


def _swiglu(
    name: str, parameter: str, hidden: int, inner: int, expert: int | None = None
) -> Iterator[CheckpointTensor]:
    # A stack of experts is a bare parameter, a single MLP holds linear layers.
    suffix = ".weight" if expert is None else ""
    gate_up, down = f"{parameter}.gate_up_proj{suffix}", f"{parameter}.down_proj{suffix}"
    shape = (inner, hidden)
    yield _text(f"model.{name}.gate_proj.weight", shape, gate_up, expert=expert, first_row=0)
    yield _text(f"model.{name}.up_proj.weight", shape, gate_up, expert=expert, first_row=inner)
    yield _text(f"model.{name}.down_proj.weight", (hidden, inner), down, expert=expert)


def _vision(vision: VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    size, inner, patch = vision.vt_hidden_size, vision.vt_intermediate_size, vision.patch_size
    grid = (vision.init_pos_emb_height, vision.init_pos_emb_width)
    embed, encoder = "vision_tower.patch_embed", "vision_tower.encoder"
    yield f"{embed}.pos_emb.weight", (*grid, size)
    yield from _with_bias(f"{embed}.proj", (size, 3, patch, patch))
    for block_index in range(vision.vt_num_hidden_layers):
        block = f"{encoder}.blocks.{block_index}"
        yield from _with_bias(f"{block}.norm0", (size,))
        yield from _with_bias(f"{block}.norm1", (size,))
        yield from _with_bias(f"{block}.wqkv", (3 * size, size))
        yield from _with_bias(f"{block}.wo", (size, size))
        yield from _with_bias(f"{block}.mlp.fc0", (inner, size))
        yield from _with_bias(f"{block}.mlp.fc1", (size, inner))
    yield from _with_bias(f"{encoder}.final_layernorm", (size,))
    joined = vision.projector_size
    yield from _with_bias("mm_projector.pre_norm", (size,))
    yield from _with_bias("mm_projector.proj.0", (joined, joined))
    yield from _with_bias("mm_projector.proj.2", (vision.text_hidden_size, joined))


def _with_bias(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
