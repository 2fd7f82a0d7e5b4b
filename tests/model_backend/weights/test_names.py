import math

import pytest
import torch

from swarm_sdk.model_backend.model.config import KimiConfig, k25, nano, tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights.names import checkpoint_tensors

LAYER = "language_model.model.layers.7."
BLOCK = "vision_tower.encoder.blocks.26."
# The tensors of the released checkpoint, experts as they are before quantisation to INT4.
RELEASED = {
    "language_model.model.embed_tokens.weight": (163840, 7168),
    "language_model.lm_head.weight": (163840, 7168),
    "language_model.model.norm.weight": (7168,),
    "language_model.model.layers.0.mlp.gate_proj.weight": (18432, 7168),
    "language_model.model.layers.0.mlp.up_proj.weight": (18432, 7168),
    "language_model.model.layers.0.mlp.down_proj.weight": (7168, 18432),
    LAYER + "input_layernorm.weight": (7168,),
    LAYER + "post_attention_layernorm.weight": (7168,),
    LAYER + "self_attn.q_a_proj.weight": (1536, 7168),
    LAYER + "self_attn.q_a_layernorm.weight": (1536,),
    LAYER + "self_attn.q_b_proj.weight": (12288, 1536),
    LAYER + "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    LAYER + "self_attn.kv_a_layernorm.weight": (512,),
    LAYER + "self_attn.kv_b_proj.weight": (16384, 512),
    LAYER + "self_attn.o_proj.weight": (7168, 8192),
    LAYER + "mlp.gate.weight": (384, 7168),
    LAYER + "mlp.gate.e_score_correction_bias": (384,),
    LAYER + "mlp.shared_experts.gate_proj.weight": (2048, 7168),
    LAYER + "mlp.shared_experts.up_proj.weight": (2048, 7168),
    LAYER + "mlp.shared_experts.down_proj.weight": (7168, 2048),
    LAYER + "mlp.experts.383.gate_proj.weight": (2048, 7168),
    LAYER + "mlp.experts.383.up_proj.weight": (2048, 7168),
    LAYER + "mlp.experts.383.down_proj.weight": (7168, 2048),
    "vision_tower.patch_embed.proj.weight": (1152, 3, 14, 14),
    "vision_tower.patch_embed.proj.bias": (1152,),
    "vision_tower.patch_embed.pos_emb.weight": (64, 64, 1152),
    BLOCK + "norm0.weight": (1152,),
    BLOCK + "norm1.bias": (1152,),
    BLOCK + "wqkv.weight": (3456, 1152),
    BLOCK + "wqkv.bias": (3456,),
    BLOCK + "wo.weight": (1152, 1152),
    BLOCK + "wo.bias": (1152,),
    BLOCK + "mlp.fc0.weight": (4304, 1152),
    BLOCK + "mlp.fc0.bias": (4304,),
    BLOCK + "mlp.fc1.weight": (1152, 4304),
    BLOCK + "mlp.fc1.bias": (1152,),
    "vision_tower.encoder.final_layernorm.weight": (1152,),
    "vision_tower.encoder.final_layernorm.bias": (1152,),
    "mm_projector.pre_norm.weight": (1152,),
    "mm_projector.pre_norm.bias": (1152,),
    "mm_projector.proj.0.weight": (4608, 4608),
    "mm_projector.proj.0.bias": (4608,),
    "mm_projector.proj.2.weight": (7168, 4608),
    "mm_projector.proj.2.bias": (7168,),
}


def test_k25_has_the_released_tensors() -> None:
    shapes = {tensor.name: tensor.shape for tensor in checkpoint_tensors(k25())}
    assert {name: shapes.get(name) for name in RELEASED} == RELEASED
    # INT4 turns each expert matrix into three tensors: packed values, scales, shape.
    num_expert_matrices = sum(".experts." in name for name in shapes)
    assert num_expert_matrices == 60 * 384 * 3
    assert len(shapes) + 2 * num_expert_matrices == 208_550


def test_k25_has_1_026_trillion_parameters_of_which_32_billion_are_active() -> None:
    text = k25().text_config
    num_total = num_active = 0.0
    for tensor in checkpoint_tensors(k25()):
        if tensor.name.startswith("language_model."):
            num_values = math.prod(tensor.shape)
            share = text.num_experts_per_tok / text.n_routed_experts
            num_total += num_values
            num_active += num_values * (1.0 if tensor.expert is None else share)
    assert num_total == pytest.approx(1.026e12, rel=1e-3)
    assert num_active == pytest.approx(32.86e9, rel=1e-3)


def test_nano_fits_in_32_mb_of_bf16() -> None:
    num_values = sum(math.prod(tensor.shape) for tensor in checkpoint_tensors(nano()))
    assert 2 * num_values <= 32e6


@pytest.mark.parametrize("config", [k25(), nano(), tiny()], ids=["k25", "nano", "tiny"])
def test_the_table_names_every_parameter_and_nothing_else(config: KimiConfig) -> None:
    with torch.device("meta"):
        state = KimiModel(config).state_dict()
    sizes = dict.fromkeys(state, 0)
    for tensor in checkpoint_tensors(config):
        assert tensor.part_of(state[tensor.parameter]).shape == tensor.shape, tensor
        sizes[tensor.parameter] += math.prod(tensor.shape)
    assert sizes == {name: value.numel() for name, value in state.items()}


def test_the_parts_of_a_parameter_do_not_overlap() -> None:
    state = {name: torch.zeros_like(v) for name, v in KimiModel(tiny()).state_dict().items()}
    for tensor in checkpoint_tensors(tiny()):
        tensor.part_of(state[tensor.parameter]).add_(1)
    assert all(bool((value == 1).all()) for value in state.values())
