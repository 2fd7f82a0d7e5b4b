"""Supervised training on recorded rows: batches, loss, balance, and that it learns."""

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.traces.parl.sft import (
    Row,
    SftConfig,
    balance_experts,
    batches,
    learning_rate,
    next_token_loss,
    train,
)


def model_of(seed: int) -> KimiModel:
    model = KimiModel(tiny())
    model.init_weights(seed)
    return model


def row(ids: list[int], num_sampled: int) -> Row:
    is_sampled = np.zeros(len(ids), dtype=np.bool_)
    is_sampled[len(ids) - num_sampled :] = True
    return Row(np.array(ids, dtype=np.uint16), is_sampled)


def test_every_row_is_in_exactly_one_batch_and_padding_weighs_nothing() -> None:
    draw = random.Random(0)
    rows = [row([i + 1] * draw.randint(2, 200), 1) for i in range(50)]
    config = SftConfig(max_steps=1, batch_tokens=1024, pool_rows=16, context_weight=0.5)
    seen: list[int] = []
    for ids_BS, weights_BS in batches(iter(rows), config):
        assert ids_BS.numel() <= 1024
        for ids, weights in zip(ids_BS, weights_BS, strict=True):
            length = int((weights > 0).sum())
            seen.append(int(ids[0]))
            assert length == len(rows[int(ids[0]) - 1].ids)
            assert weights[length - 1] == 1
            assert set(weights[: length - 1].tolist()) <= {0.5}
            assert not weights[length:].any()
    assert sorted(seen) == list(range(1, 51))


def test_the_loss_equals_a_plain_float64_sum_over_the_rows() -> None:
    model = model_of(0).double()
    rows = [row([3, 1, 4, 1, 5, 9, 2], 3), row([2, 7, 1, 8], 2)]
    config = SftConfig(max_steps=1, context_weight=0.25, pool_rows=2)
    [(ids_BS, weights_BS)] = batches(iter(rows), config)
    loss, _ = next_token_loss(model, ids_BS, weights_BS, chunk_tokens=3)
    total = weight_sum = 0.0
    for one in rows:
        ids_T = torch.tensor(one.ids.astype(np.int64))
        attention = FullAttention(model.config.text_config, [len(ids_T)])
        logprobs = model.logits(model(ids_T, torch.arange(len(ids_T)), attention)).log_softmax(-1)
        for place in range(1, len(ids_T)):
            weight = 1.0 if one.is_sampled[place] else 0.25
            total -= weight * float(logprobs[place - 1, ids_T[place]].detach())
            weight_sum += weight
    assert float(loss.detach()) == pytest.approx(total / weight_sum, rel=1e-5)  # logits are float32


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    config = SftConfig(max_steps=100, peak_lr=1.0, warmup_share=0.1)
    rates = [learning_rate(progress, config) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_training_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="no end"):
        SftConfig()
    assert math.isinf(SftConfig(max_steps=1).max_seconds)


def test_overloaded_experts_lose_bias_and_idle_ones_gain() -> None:
    model = model_of(0)
    mixtures = [layer.mlp for layer in model.layers if hasattr(layer.mlp, "gate")]
    chosen = [torch.zeros(4, m.gate.num_chosen, dtype=torch.int64) for m in mixtures]
    for ids_TK in chosen:
        ids_TK[:] = torch.arange(ids_TK.shape[1])
    balance_experts(model, chosen, torch.tensor([True, True, True, False]), rate=0.1)
    bias_E = mixtures[0].gate.e_score_correction_bias
    num_chosen = mixtures[0].gate.num_chosen
    assert torch.allclose(bias_E[:num_chosen], torch.tensor(-0.1))
    assert torch.allclose(bias_E[num_chosen:], torch.tensor(0.1))


def test_a_small_model_learns_to_say_what_it_was_shown_and_keeps_its_eyes() -> None:
    torch.manual_seed(0)
    model = model_of(0)
    eyes = {n: p.clone() for n, p in model.named_parameters() if n.startswith("vision_tower")}

    def rows() -> Iterator[Row]:
        while True:
            yield row([5, 6, 7, 8, 9, 10, 11, 12], 6)

    log: list[dict[str, float]] = []
    config = SftConfig(max_steps=40, batch_tokens=256, peak_lr=1e-2, log_every=10, pool_rows=4)
    totals = train(model, rows(), config, log.append)
    assert totals["steps"] >= 40
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]
    assert log[-1]["top1"] == 1.0
    assert all(torch.equal(p, eyes[n]) for n, p in model.named_parameters() if n in eyes)
