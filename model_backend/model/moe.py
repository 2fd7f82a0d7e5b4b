"""The feed-forward half of a layer: a dense SwiGLU, or a mixture of experts.

    scores  = sigmoid(x W_gate)                       float32, one an expert
    chosen  = top-k of (scores + e_score_correction_bias)
    weights = scores[chosen] / sum * routed_scaling_factor
    y       = sum_k weights_k * expert_k(x)  +  shared_expert(x)

The bias balances the load without a loss term ("noaux_tc", DeepSeek-V3, arXiv:2412.19437): it
takes part in the choice and never in the weights.
"""

# Shapes: T = packed tokens, D = hidden, I = inner width, E = routed experts, K = experts a token.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarm_sdk.model_backend.kernels.experts import run_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swarm_sdk.model_backend.model.config import TextConfig


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one matrix, gate first."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj: nn.Linear = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj: nn.Linear = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the output [T, D]."""
        gate_TI, up_TI = self.gate_up_proj(x_TD).chunk(2, dim=-1)
        y_TD: Tensor = self.down_proj(functional.silu(gate_TI) * up_TI)
        return y_TD


class Router(nn.Module):
    """Chooses the experts of each token, in float32 whatever the model's dtype."""

    e_score_correction_bias: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_chosen: int = config.num_experts_per_tok
        self.routed_scaling_factor: float = config.routed_scaling_factor
        self.weight: nn.Parameter = nn.Parameter(
            torch.empty(config.n_routed_experts, config.hidden_size)
        )
        bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ids [T, K] (int64) and weights [T, K] (float32) of the chosen experts.

        Given ``expert_ids_TK`` it weighs those and chooses none.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = functional.linear(x_TD.float(), self.weight.float()).sigmoid()
        if expert_ids_TK is None:
            expert_ids_TK = (scores_TE + self.e_score_correction_bias).topk(
                self.num_chosen, dim=-1, sorted=False
            )[1]
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        total_T1 = weights_TK.sum(dim=-1, keepdim=True) + 1e-20
        return expert_ids_TK, weights_TK * (self.routed_scaling_factor / total_T1)


class Experts(nn.Module):
    """The routed experts, stacked: ``gate_up_proj`` [E, 2I, D] and ``down_proj`` [E, D, I]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        num_experts, inner = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up_proj: nn.Parameter = nn.Parameter(
            torch.empty(num_experts, 2 * inner, config.hidden_size)
        )
        self.down_proj: nn.Parameter = nn.Parameter(
            torch.empty(num_experts, config.hidden_size, inner)
        )

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sum [T, D] of the chosen experts' outputs."""
        return run_experts(x_TD, expert_ids_TK, weights_TK, self.gate_up_proj, self.down_proj)


class ReplayedExperts:
    """Choices on record that take the place of the routers' own (routing replay, R3).

    Rounding sends a token to other experts in the trainer than in the engine that sampled it; with
    the engine's choices the weights and the gradients are still the trainer's. One pass uses it up.
    """

    def __init__(self, experts_TLK: Tensor) -> None:
        """``experts_TLK`` [T, mixture layers, K] (int64), in the order of the layers."""
        self.layers: Iterator[Tensor] = iter(experts_TLK.unbind(1))


Choices = list[Tensor] | ReplayedExperts


class MixtureOfExperts(nn.Module):
    """Routed experts and the shared expert that every token passes."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate: Router = Router(config)
        self.experts: Experts = Experts(config)
        shared_size = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts: SwiGLU = SwiGLU(config.hidden_size, shared_size)

    def forward(self, x_TD: Tensor, chosen_experts: Choices | None = None) -> Tensor:
        """Return the output [T, D].

        A list is appended the chosen ids [T, K]; ``ReplayedExperts`` say which to choose.
        """
        replayed_TK = (
            next(chosen_experts.layers) if isinstance(chosen_experts, ReplayedExperts) else None
        )
        expert_ids_TK, weights_TK = self.gate(x_TD, replayed_TK)
        if isinstance(chosen_experts, list):
            chosen_experts.append(expert_ids_TK)
        y_TD: Tensor = self.experts(x_TD, expert_ids_TK, weights_TK) + self.shared_experts(x_TD)
        return y_TD
