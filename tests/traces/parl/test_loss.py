"""Eq. (1) against a float64 reference, its gradient against finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.parl.loss import LossConfig, policy_loss

CONFIG = LossConfig(alpha=0.6, beta=1.7, tau=0.03)


def responses(seed: int, num_questions: int = 3, num_responses: int = 4):
    """Of each question: rewards, and for each response (log p_theta, log p_old) of its tokens."""
    draw = np.random.default_rng(seed)
    questions = []
    for _ in range(num_questions):
        rewards = draw.uniform(-1, 1, num_responses)
        tokens = []
        for _ in range(num_responses):
            old = -draw.exponential(1.0, draw.integers(1, 9))
            tokens.append((np.minimum(old + draw.normal(0, 0.5, len(old)), -1e-3), old))
        questions.append((rewards, tokens))
    return questions


def reference(questions, config: LossConfig) -> float:
    """Minus eq. (1), question by question, response by response, token by token."""
    total = 0.0
    for rewards, tokens in questions:
        mean, num, gain = np.mean(rewards), sum(len(new) for new, _ in tokens), 0.0
        for reward, (new, old) in zip(rewards, tokens, strict=True):
            for new_one, old_one in zip(new, old, strict=True):
                ratio = math.exp(new_one - old_one)
                gain += min(max(ratio, config.alpha), config.beta) * (reward - mean)
                gain -= config.tau * (new_one - old_one) ** 2
        total += gain / num
    return -total / len(questions)


def flat(questions):
    new, old, advantages, weights = [], [], [], []
    for rewards, tokens in questions:
        num = sum(len(one) for one, _ in tokens)
        for reward, (one, other) in zip(rewards, tokens, strict=True):
            new += list(one)
            old += list(other)
            advantages += [reward - np.mean(rewards)] * len(one)
            weights += [1 / (len(questions) * num)] * len(one)
    return [torch.tensor(np.array(x), dtype=torch.float64) for x in (new, old, advantages, weights)]


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_minus_equation_1_as_a_plain_sum_gives_it(seed: int) -> None:
    questions = responses(seed)
    parts = policy_loss(*flat(questions), CONFIG)
    assert float(parts.loss) == pytest.approx(reference(questions, CONFIG), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_finite_differences(seed: int) -> None:
    new, old, advantages, weights = flat(responses(seed))
    new.requires_grad_()
    policy_loss(new, old, advantages, weights, CONFIG).loss.backward()
    assert new.grad is not None
    step = 1e-6
    for place in range(len(new)):
        moved = [new.detach().clone() for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (float(policy_loss(x, old, advantages, weights, CONFIG).loss) for x in moved)
        assert float(new.grad[place]) == pytest.approx((up - down) / (2 * step), abs=1e-8)


@given(st.floats(-3, 3), st.floats(-2, 2))
def test_outside_the_interval_only_the_tau_term_pulls_whatever_the_advantage(
    log_ratio: float, advantage: float
) -> None:
    config = LossConfig(alpha=0.5, beta=2.0, tau=0.1)
    new = torch.tensor([log_ratio - 2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-2.0], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    parts = policy_loss(new, old, advantage * one, one, config)
    parts.loss.backward()
    ratio = math.exp(float(new.detach() - old))
    is_inside = 0.5 <= ratio <= 2.0
    expected = 2 * 0.1 * float(new.detach() - old) - is_inside * ratio * advantage
    assert new.grad is not None
    assert float(new.grad) == pytest.approx(expected, abs=1e-9)
    assert float(parts.num_masked) == float(not is_inside)
    assert float(parts.kl) >= 0


def test_the_loss_adds_up_however_a_batch_is_cut() -> None:
    columns = flat(responses(7))
    whole = policy_loss(*columns, CONFIG).loss
    cut = sum(policy_loss(*(c[i : i + 5] for c in columns), CONFIG).loss for i in range(0, 99, 5))
    assert float(cut) == pytest.approx(float(whole), rel=1e-12)


def test_ppos_clip_depends_on_the_sign_of_the_advantage_and_the_mask_does_not() -> None:
    old = torch.zeros(2, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    gradients = {}
    for clip in ("mask", "ppo"):
        new = torch.full((2,), math.log(3.0), dtype=torch.float64, requires_grad=True)
        config = LossConfig(alpha=0.5, beta=2.0, tau=0.0, clip=clip)
        policy_loss(
            new, old, advantages, torch.ones(2, dtype=torch.float64), config
        ).loss.backward()
        gradients[clip] = new.grad.tolist()
    assert gradients == {"mask": [0.0, 0.0], "ppo": [0.0, pytest.approx(3.0)]}


def test_bounds_that_do_not_hold_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 < alpha <= 1 <= beta"):
        LossConfig(alpha=1.2)
    with pytest.raises(ConfigError, match="tau"):
        LossConfig(tau=-1.0)
