"""The policy loss of PARL: eq. (1) of the K2.5 report (arXiv:2602.02276, section 4.4.2).

    gain = mean over questions x of  1/N_x  sum over the K responses and their tokens of
               Clip(rho, alpha, beta) * (r - mean r)  -  tau * (log rho)^2

    rho = p_theta(token) / p_old(token),    N_x = all generated tokens of the K responses

``Clip`` is a plain clamp: inside [alpha, beta] the gradient is that of the policy gradient, outside
it is zero, *whatever the sign of the advantage* (PPO's depends on it). The report prints "alpha,
beta > 0" and speaks of log-ratios within [alpha, beta]; both hold only if alpha and beta bound the
ratio, so here log alpha <= log rho <= log beta. It says "minimise" of an expression that is a gain:
we minimise its negative. The tau term is not masked, as printed: it pulls tokens back that have
drifted out of the interval. Only tokens that the orchestrator sampled take part, and N counts
those alone: no others are trained. The report gives no values; those below are ours.
"""

# Shapes: X = trained tokens.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swarm_sdk.errors import ConfigError

Clip = Literal["mask", "ppo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Ours, by trial: the report gives no values."""

    alpha: float = 0.5
    """Lower bound of the ratio."""
    beta: float = 2.0
    """Upper bound of the ratio."""
    tau: float = 0.05
    """Weight of the squared log-ratio."""
    clip: Clip = "mask"
    """``mask`` is eq. (1); ``ppo`` is min(rho A, Clip(rho) A), to compare with."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 <= self.beta:
            raise ConfigError(
                f"the ratio's bounds must hold 0 < alpha <= 1 <= beta, got {self.alpha} and "
                f"{self.beta}"
            )
        if self.tau < 0 or not math.isfinite(self.tau):
            raise ConfigError(f"tau must be at least 0, got {self.tau}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossParts:
    """The loss of some tokens and what it was made of, all sums that add up over batches."""

    loss: Tensor
    """Minus eq. (1), with its gradient."""
    num_tokens: Tensor
    num_masked: Tensor
    """Tokens without a policy gradient."""
    kl: Tensor
    """Sum of rho - 1 - log rho (nats): an estimate of KL(p_old || p_theta) that is never < 0."""


def policy_loss(
    logprobs_X: Tensor,
    sampled_logprobs_X: Tensor,
    advantages_X: Tensor,
    weights_X: Tensor,
    config: LossConfig,
) -> LossParts:
    """Minus eq. (1) over X tokens.

    Args:
        logprobs_X: log p_theta of the sampled ids, with gradient.
        sampled_logprobs_X: what the sampler recorded, log p_old.
        advantages_X: r - mean r of the token's response.
        weights_X: 1 / (questions * N_x). The sum over all tokens of a batch is then eq. (1) however
            the batch is cut into micro-batches or spread over processes.
        config: the bounds and tau.
    """
    log_ratio_X = logprobs_X - sampled_logprobs_X
    ratio_X = log_ratio_X.exp()
    clipped_X = ratio_X.clamp(config.alpha, config.beta)
    gain_X = clipped_X * advantages_X
    if config.clip == "ppo":
        gain_X = torch.minimum(ratio_X * advantages_X, gain_X)
    loss = (weights_X * (config.tau * log_ratio_X.square() - gain_X)).sum()
    with torch.no_grad():
        is_outside_X = (ratio_X < config.alpha) | (ratio_X > config.beta)
        if config.clip == "ppo":
            is_outside_X = is_outside_X & (gain_X != ratio_X * advantages_X)
        return LossParts(
            loss=loss,
            num_tokens=torch.tensor(float(len(logprobs_X)), device=logprobs_X.device),
            num_masked=is_outside_X.sum().float(),
            kl=(log_ratio_X.expm1() - log_ratio_X).clamp_min(0.0).sum(),  # float32 rounds
        )
