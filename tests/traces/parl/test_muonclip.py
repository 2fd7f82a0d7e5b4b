"""MuonClip against float64 NumPy, and QK-Clip on logits that explode."""

import numpy as np
import pytest
import torch

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.traces.parl.muonclip import (
    MuonClip,
    MuonClipConfig,
    matrix_parts,
    newton_schulz,
    qk_clip,
)


def model_of(seed: int) -> KimiModel:
    model = KimiModel(tiny())
    model.init_weights(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("vision_tower", "mm_projector")))
    return model


def newton_schulz_reference(update: np.ndarray) -> np.ndarray:
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if update.shape[0] > update.shape[1] else x


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_the_iteration_equals_numpy_in_float64_and_batches_alike(shape: tuple[int, int]) -> None:
    stack = np.random.default_rng(0).normal(size=(3, *shape))
    found = newton_schulz(torch.tensor(stack)).numpy()
    for one, expected in zip(found, stack, strict=True):
        np.testing.assert_allclose(one, newton_schulz_reference(expected), atol=1e-12)


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    matrix = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(newton_schulz(matrix), full_matrices=False)
    assert 0.6 < float(s.min()) <= float(s.max()) < 1.3
    u0, _, v0 = torch.linalg.svd(matrix, full_matrices=False)
    near = (u0 @ v0).flatten() @ (u @ v).flatten() / 20
    assert float(near) > 0.99


def test_joined_matrices_and_experts_are_told_apart() -> None:
    parts = matrix_parts(model_of(0))
    text = tiny().text_config
    assert parts["layers.1.self_attn.qkv_a_proj.weight"] == ((0, 48), (48, 40))
    inner = text.moe_intermediate_size
    assert parts["layers.1.mlp.experts.gate_up_proj"] == ((0, inner), (inner, inner))
    assert parts["layers.1.mlp.experts.down_proj"] == ((0, text.hidden_size),)
    assert not any("embed" in name or "lm_head" in name or "vision" in name for name in parts)


def reference_steps(value: np.ndarray, gradients, parts, config: MuonClipConfig) -> np.ndarray:
    """Muon on one matrix or a stack, joined parts apart."""
    momentum = np.zeros_like(value)
    for gradient in gradients:
        momentum = config.momentum * momentum + gradient
        update = gradient + config.momentum * momentum
        value = value * (1 - config.lr * config.weight_decay)
        stack, out = update.reshape(-1, *update.shape[-2:]), []
        for one in stack:
            rows = []
            for first, num in parts:
                part = one[first : first + num]
                rows.append(newton_schulz_reference(part) * 0.2 * np.sqrt(max(part.shape)))
            out.append(np.concatenate(rows))
        value = value - config.lr * np.stack(out).reshape(value.shape)
    return value


def test_three_steps_equal_a_float64_reference_on_every_parameter() -> None:
    model = model_of(0).double()
    config = MuonClipConfig(lr=0.01)
    optimizer = MuonClip(model, config)
    draw = np.random.default_rng(1)
    parts = matrix_parts(model)
    before = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    gradients = {n: [draw.normal(size=p.shape) for _ in range(3)] for n, p in before.items()}
    for step in range(3):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.tensor(gradients[name][step])
        optimizer.step()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            expected = before[name]
        elif name in parts:
            expected = reference_steps(before[name], gradients[name], parts[name], config)
        else:
            expected = adamw_reference(before[name], gradients[name], config)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=1e-10, err_msg=name)


def adamw_reference(value: np.ndarray, gradients, config: MuonClipConfig) -> np.ndarray:
    mean = square = np.zeros_like(value)
    decay = config.weight_decay if value.ndim >= 2 else 0.0
    for count, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        unbiased = mean / (1 - 0.9**count), square / (1 - 0.95**count)
        value = value * (1 - config.lr * decay)
        value = value - config.lr * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return value


def logits_reference(model: KimiModel, ids: list[int]) -> np.ndarray:
    """Largest softmax input of every layer and head, from q and k made in the plain way."""
    found = []
    config = model.config.text_config

    class Spy(FullAttention):
        def attend(self, layer_index, q_nope, q_rope, latent, k_rope, kv_b):
            kv = (latent @ kv_b.T).view(len(latent), config.num_attention_heads, -1)
            q = torch.cat([q_nope, q_rope], -1).detach().double().numpy()
            k_nope = kv[..., : config.qk_nope_head_dim]
            k = torch.cat([k_nope, k_rope[:, None].expand_as(q_rope)], -1).detach().double().numpy()
            scores = np.einsum("thk,shk->hts", q, k) * config.softmax_scale
            scores[:, ~np.tril(np.ones(scores.shape[1:], dtype=bool))] = -np.inf
            found.append(scores.max((1, 2)))
            return super().attend(layer_index, q_nope, q_rope, latent, k_rope, kv_b)

    model(torch.tensor(ids), torch.arange(len(ids)), Spy(config, [len(ids)]))
    return np.stack(found)


def max_logits(model: KimiModel, segments: list[list[int]]) -> torch.Tensor:
    text = model.config.text_config
    found = torch.full((text.num_hidden_layers, text.num_attention_heads), -torch.inf)
    lens = [len(ids) for ids in segments]
    positions = torch.cat([torch.arange(n) for n in lens])
    ids = torch.tensor([i for ids in segments for i in ids])
    model(ids, positions, FullAttention(text, lens, max_logits_YH=found))
    return found


def test_the_forward_collects_the_largest_logit_of_each_head_over_all_segments() -> None:
    model = model_of(3)
    segments = [list(range(5, 45)), [9, 8, 7], list(range(100, 130))]
    expected = np.stack([logits_reference(model, ids) for ids in segments]).max(0)
    np.testing.assert_allclose(max_logits(model, segments).numpy(), expected, rtol=1e-5)


def test_clipped_heads_have_logits_of_tau_and_others_keep_theirs() -> None:
    model = model_of(3)
    ids = [list(range(5, 45))]
    before = max_logits(model, ids)
    tau = float(before.median())
    num_clipped = qk_clip(model, before, tau)
    assert num_clipped == int((before > tau).sum()) > 0
    first = max_logits(model, ids)[0]  # later layers see other inputs
    assert first.numpy() == pytest.approx(before[0].clamp_max(tau).numpy(), rel=1e-5)


def test_values_and_the_shared_rotary_key_are_untouched_by_the_clip() -> None:
    model = model_of(3)
    text = model.config.text_config
    before = {n: p.clone() for n, p in model.named_parameters()}
    logits = torch.full((text.num_hidden_layers, text.num_attention_heads), 4.0)
    qk_clip(model, logits, 1.0)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split(".")[-2] for name in changed} == {"q_b_proj", "kv_b_proj"}
    q = model.layers[0].self_attn.q_b_proj.weight / before["layers.0.self_attn.q_b_proj.weight"]
    q = q.view(text.num_attention_heads, text.qk_head_dim, -1)[:, :, 0]
    nope = text.qk_nope_head_dim
    assert torch.allclose(q[:, :nope], torch.tensor(0.5))
    assert torch.allclose(q[:, nope:], torch.tensor(0.25))
    kv = model.layers[0].self_attn.kv_b_proj.weight / before["layers.0.self_attn.kv_b_proj.weight"]
    kv = kv.view(text.num_attention_heads, -1, kv.shape[1])[:, :, 0]
    assert torch.allclose(kv[:, :nope], torch.tensor(0.5))
    assert torch.allclose(kv[:, nope:], torch.tensor(1.0))


@pytest.mark.parametrize("is_clipped", [True, False])
def test_logits_that_explode_without_the_clip_stay_at_tau_with_it(is_clipped: bool) -> None:
    model = model_of(5)
    optimizer = MuonClip(model, MuonClipConfig(lr=0.2, weight_decay=0.0))
    segments, tau = [list(range(5, 37))], 2.0
    largest = 0.0
    for _ in range(12):
        found = max_logits(model, segments)
        largest = float(found.max())
        model.zero_grad()
        for layer in model.layers:  # gradients that ask for ever larger queries and keys
            attention = layer.self_attn
            for weight in (attention.q_b_proj.weight, attention.kv_b_proj.weight):
                weight.grad = -weight.detach().clone()
        optimizer.step()
        if is_clipped:
            qk_clip(model, max_logits(model, segments), tau)
    if is_clipped:
        assert float(max_logits(model, segments)[0].max()) <= tau * 1.001
    else:
        assert largest > 3 * tau


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="tau"):
        MuonClipConfig(tau=0)
