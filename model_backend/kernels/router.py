"""The router of a mixture: which experts each token takes, and how much of each.

    scores  = sigmoid(x W^T)                          float32, one an expert
    chosen  = top-k of (scores + bias)                the bias chooses and never weighs
    weights = scores[chosen] / sum * scale

    d score_k = (scale d weight_k - sum_j d weight_j weight_j) / sum,    d logit = d score s (1 - s)

One product and one kernel forward; backward the K logits of a token that have a gradient are
scattered into a row of zeros, and two products follow.
"""

# Shapes: T = tokens, D = hidden, E = experts, K = experts a token.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swarm_sdk.model_backend.kernels import fused


def route_reference(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_chosen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As the formulas stand: the truth that ``route`` keeps."""
    scores_TE = functional.linear(x_TD, weight_ED).sigmoid()
    ids_TK = (scores_TE + bias_E).topk(num_chosen, dim=-1)[1]
    scores_TK = scores_TE.gather(1, ids_TK)
    return ids_TK, scores_TK / scores_TK.sum(-1, keepdim=True) * scale


def route(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_chosen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Ids [T, K] (int64) and weights [T, K] of the chosen experts, in no order.

    Scores and weights are float32 (float64 for float64), also under autocast. Differentiable in
    ``x_TD`` and ``weight_ED``, once.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = _Route.apply(  # type: ignore[no-untyped-call]
            x_TD, weight_ED, bias_E, num_chosen, scale
        )
    return found


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_chosen: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        logits_TE = _logits(x_TD, weight_ED)
        turn = fused.choose if fused.can_run(logits_TE) else choose
        ids_TK, weights_TK, scores_TK = turn(logits_TE, bias_E, num_chosen, scale)
        ctx.save_for_backward(x_TD, weight_ED, ids_TK, weights_TK, scores_TK)
        ctx.scale = scale
        ctx.mark_non_differentiable(ids_TK)
        return ids_TK, weights_TK

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        d_weights_TK = gradients[1]
        x_TD, weight_ED, ids_TK, weights_TK, scores_TK = ctx.saved_tensors
        total_T1 = scores_TK.sum(-1, keepdim=True) + 1e-20
        mean_T1 = (d_weights_TK * weights_TK).sum(-1, keepdim=True)
        d_scores_TK = (d_weights_TK * ctx.scale - mean_T1) / total_T1
        d_logits_TK = d_scores_TK * scores_TK * (1 - scores_TK)
        d_logits_TE = d_logits_TK.new_zeros(len(x_TD), len(weight_ED))
        d_logits_TE.scatter_(1, ids_TK, d_logits_TK)
        if _is_exact_in_bf16(x_TD, weight_ED):
            d_logits_TE = d_logits_TE.bfloat16()
        dtype = d_logits_TE.dtype
        d_x_TD = d_weight_ED = None
        if ctx.needs_input_grad[0]:
            d_x_TD = (d_logits_TE @ weight_ED.to(dtype)).to(x_TD.dtype)
        if ctx.needs_input_grad[1]:
            d_weight_ED = (d_logits_TE.t() @ x_TD.to(dtype)).to(weight_ED.dtype)
        return d_x_TD, d_weight_ED, None, None, None


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    if _is_exact_in_bf16(x_TD, weight_ED):
        return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return functional.linear(x_TD.to(wide), weight_ED.to(wide))


def _is_exact_in_bf16(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Products of bfloat16 numbers are exact in float32, so tensor cores lose nothing."""
    return x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16


def choose(
    logits_TE: Tensor, bias_E: Tensor, num_chosen: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, weights and scores [T, K] of the chosen experts."""
    scores_TE = logits_TE.sigmoid()
    ids_TK = (scores_TE + bias_E).topk(num_chosen, dim=-1, sorted=False)[1]
    scores_TK = scores_TE.gather(1, ids_TK)
    return ids_TK, scores_TK * (scale / (scores_TK.sum(-1, keepdim=True) + 1e-20)), scores_TK
