import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import nano, tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.media import MediaBatch, MediaItem
from swarm_sdk.model_backend.model.mla import FullAttention, absorb
from swarm_sdk.model_backend.model.moe import Router
from swarm_sdk.model_backend.model.rope import rotate, text_rotation

CONFIG = tiny().text_config


def random_ids(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def run_packed(model: KimiModel, sequences: list[Tensor]) -> list[Tensor]:
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = FullAttention(model.config.text_config, lengths)
    hidden: Tensor = model(torch.cat(sequences), positions, attention)
    return list(hidden.split(lengths))


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [(7, 12, 1), (9, 9, 9)], ids=["ragged", "equal"])
def test_packed_sequences_do_not_see_each_other(
    tiny_model: KimiModel, lengths: tuple[int, ...]
) -> None:
    sequences = random_ids(*lengths)
    alone = [run_packed(tiny_model, [sequence])[0] for sequence in sequences]
    for together, by_itself in zip(run_packed(tiny_model, sequences), alone, strict=True):
        torch.testing.assert_close(together, by_itself, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_token_does_not_see_later_tokens(tiny_model: KimiModel) -> None:
    (sequence,) = random_ids(16)
    changed = sequence.clone()
    changed[10] += 1
    before, after = (run_packed(tiny_model, [ids])[0] for ids in (sequence, changed))
    torch.testing.assert_close(before[:10], after[:10], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[10:], after[10:], atol=1e-3)


def test_the_absorbed_form_equals_the_full_form() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads, num_tokens = CONFIG.num_attention_heads, 19
    q_nope = draw(num_tokens, heads, CONFIG.qk_nope_head_dim)
    q_rope = draw(num_tokens, heads, CONFIG.qk_rope_head_dim)
    latent, k_rope = (
        draw(num_tokens, CONFIG.kv_lora_rank),
        draw(num_tokens, CONFIG.qk_rope_head_dim),
    )
    kv_b_proj = draw(heads * (CONFIG.qk_nope_head_dim + CONFIG.v_head_dim), CONFIG.kv_lora_rank)
    full = FullAttention(CONFIG, [num_tokens])
    expected = full.attend(0, q_nope, q_rope, latent, k_rope, kv_b_proj)
    absorbed = absorb(q_nope, q_rope, latent, k_rope, kv_b_proj, config=CONFIG)
    torch.testing.assert_close(absorbed, expected, atol=1e-4, rtol=1e-4)
    last = absorb(q_nope[-3:], q_rope[-3:], latent, k_rope, kv_b_proj, config=CONFIG)
    torch.testing.assert_close(last, expected[-3:], atol=1e-4, rtol=1e-4)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 400))
@settings(max_examples=30, deadline=None)
def test_rotated_products_depend_on_the_distance_alone(a: int, b: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 1, CONFIG.qk_rope_head_dim, generator=generator)

    def product(q_position: int, k_position: int) -> float:
        turned = (
            rotate(x, text_rotation(torch.tensor([position]), CONFIG))
            for x, position in ((q, q_position), (k, k_position))
        )
        q_turned, k_turned = turned
        return float((q_turned * k_turned).sum())

    assert product(a, b) == pytest.approx(product(a + shift, b + shift), abs=2e-3)


def test_the_correction_bias_chooses_experts_and_does_not_weigh_them() -> None:
    router = Router(CONFIG)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    x_TD = torch.randn(5, CONFIG.hidden_size, generator=torch.Generator().manual_seed(4))
    router.e_score_correction_bias[6] = 10.0
    expert_ids, weights = router(x_TD)
    assert bool((expert_ids == 6).any(dim=1).all())
    scores = torch.sigmoid(x_TD @ router.weight.T).gather(1, expert_ids)
    expected = scores / scores.sum(dim=1, keepdim=True) * CONFIG.routed_scaling_factor
    torch.testing.assert_close(weights, expected)
    router.e_score_correction_bias[6] = -10.0
    assert not bool((router(x_TD)[0] == 6).any())


@torch.inference_mode()
def test_replayed_experts_take_the_place_of_the_routers_choice_layer_by_layer(
    tiny_model: KimiModel,
) -> None:
    (ids_T,) = random_ids(9)

    def hidden(chosen: list[Tensor] | None = None, replayed: list[Tensor] | None = None) -> Tensor:
        attention = FullAttention(tiny_model.config.text_config, [len(ids_T)])
        places_T = torch.arange(len(ids_T))
        found: Tensor = tiny_model(ids_T, places_T, attention, None, chosen, replayed)
        return found

    chosen: list[Tensor] = []
    own = hidden(chosen)
    torch.testing.assert_close(hidden(replayed=chosen), own, atol=0, rtol=0)
    # In another order of the experts of a token: the same up to the order of a sum.
    torch.testing.assert_close(hidden(replayed=[ids.flip(-1) for ids in chosen]), own)
    others = [(ids + 1) % tiny_model.config.text_config.n_routed_experts for ids in chosen]
    assert not torch.allclose(hidden(replayed=others), own, atol=1e-2)


def test_the_router_computes_in_float32_for_a_bf16_model() -> None:
    router = Router(CONFIG).to(torch.bfloat16)
    router.e_score_correction_bias = router.e_score_correction_bias.float()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    x_TD = torch.randn(
        50, CONFIG.hidden_size, generator=torch.Generator().manual_seed(4)
    ).bfloat16()
    precise = Router(CONFIG)
    precise.load_state_dict(router.state_dict())
    torch.testing.assert_close(router(x_TD)[1], precise(x_TD.float())[1], atol=0, rtol=0)


@torch.inference_mode()
def test_the_chosen_experts_are_told_layer_by_layer(tiny_model: KimiModel) -> None:
    (sequence,) = random_ids(11)
    chosen: list[Tensor] = []
    attention = FullAttention(CONFIG, [11])
    tiny_model(sequence, torch.arange(11), attention, chosen_experts=chosen)
    assert [tuple(ids.shape) for ids in chosen] == [(11, CONFIG.num_experts_per_tok)] * 2


@torch.inference_mode()
def test_encoded_features_can_stand_for_the_pictures(tiny_model: KimiModel) -> None:
    item, token_ids = picture_and_ids(tiny_model)
    attention, positions = FullAttention(CONFIG, [len(token_ids)]), torch.arange(len(token_ids))
    batch = MediaBatch.of([item])
    features = tiny_model.encode_media(batch)
    assert features.shape == (batch.num_tokens, CONFIG.hidden_size)
    by_pixels = tiny_model(token_ids, positions, attention, batch)
    assert torch.equal(by_pixels, tiny_model(token_ids, positions, attention, features))


def test_placeholders_without_their_pictures_are_refused(tiny_model: KimiModel) -> None:
    item, token_ids = picture_and_ids(tiny_model)
    attention = FullAttention(CONFIG, [len(token_ids) - 1])
    with pytest.raises(ConfigError, match="5 media placeholders, but its pictures fill 6"):
        tiny_model(
            token_ids[1:], torch.arange(len(token_ids) - 1), attention, MediaBatch.of([item])
        )


def picture_and_ids(model: KimiModel) -> tuple[MediaItem, Tensor]:
    patches = torch.rand(24, 3, 14, 14, generator=torch.Generator().manual_seed(5)).numpy()
    item = MediaItem(patches, (1, 4, 6))
    placeholders = torch.full((item.num_tokens,), model.config.media_placeholder_token_id)
    return item, torch.cat([placeholders, torch.arange(9)])


def test_every_parameter_gets_a_gradient(tiny_model: KimiModel) -> None:
    item, token_ids = picture_and_ids(tiny_model)
    clip = MediaItem(item.patches, (2, 2, 6))
    token_ids = torch.cat([token_ids[:3], token_ids])  # the clip's 3 tokens before the picture's
    token_ids = torch.cat([token_ids, *random_ids(200)])
    num_tokens = len(token_ids)
    attention = FullAttention(CONFIG, [num_tokens])
    with torch.inference_mode():  # an engine ran first in this process
        tiny_model(token_ids, torch.arange(num_tokens), attention, MediaBatch.of([clip, item]))
    hidden = tiny_model(token_ids, torch.arange(num_tokens), attention, MediaBatch.of([clip, item]))
    logits = tiny_model.logits(hidden)
    assert logits.dtype == torch.float32
    logits.square().mean().backward()
    missing = [
        name
        for name, parameter in tiny_model.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
    tiny_model.zero_grad(set_to_none=True)
    assert missing == []


def test_fresh_weights_are_drawn_from_the_seed_alone() -> None:
    models = [KimiModel(tiny()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(seed)
    a, b, other = (model.lm_head.weight for model in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert float(a.detach().std()) == pytest.approx(0.02, rel=0.05)


@torch.inference_mode()
def test_nano_runs_in_bf16() -> None:
    model = KimiModel(nano())
    model.init_weights(0)
    model.to(torch.bfloat16)
    (hidden,) = run_packed(model, random_ids(8))
    logits = model.logits(hidden)
    assert hidden.dtype == torch.bfloat16
    assert logits.shape == (8, 4096)
    assert bool(logits.isfinite().all())
