"""The product of a mixture's routed experts.

    y_t = sum over k of weights_tk * down_e( silu(gate_e x_t) * (up_e x_t) ),   e = expert_ids_tk

Rows are sorted by expert, so that each expert is one matrix product over its own rows: a loop
over the experts on the CPU, one grouped product (``torch._grouped_mm``, bfloat16) on CUDA. All
paths are differentiable; ``run_experts_reference`` is the truth they are tested against.
"""

# Shapes: T = tokens, K = experts a token, D = hidden, I = inner width, E = experts, R = T*K rows.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def run_experts_reference(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """Output [T, D], token by token and expert by expert, in the dtype of ``x_TD``."""
    y_TD = torch.zeros_like(x_TD)
    for token, experts in enumerate(expert_ids_TK.tolist()):
        for place, expert in enumerate(experts):
            gate_I, up_I = (gate_up_E2ID[expert] @ x_TD[token]).chunk(2)
            y_TD[token] += weights_TK[token, place] * (down_EDI[expert] @ (F.silu(gate_I) * up_I))
    return y_TD


def run_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """Output [T, D] of the chosen experts; ``expert_ids_TK`` int64, ``weights_TK`` float32."""
    num_chosen = expert_ids_TK.shape[1]
    order_R = expert_ids_TK.flatten().argsort(stable=True)
    counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=gate_up_E2ID.shape[0])
    x_RD = x_TD[order_R // num_chosen]
    if x_TD.is_cuda:
        y_RD = _grouped(x_RD, counts_E, gate_up_E2ID, down_EDI)
    else:
        y_RD = _looped(x_RD, counts_E, gate_up_E2ID, down_EDI)
    y_RD = y_RD * weights_TK.flatten()[order_R, None].to(y_RD.dtype)
    return x_TD.new_zeros(x_TD.shape).index_add(0, order_R // num_chosen, y_RD.to(x_TD.dtype))


def _looped(x_RD: Tensor, counts_E: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Tensor:
    parts = []
    for expert, rows_XD in enumerate(x_RD.split(counts_E.tolist())):
        if len(rows_XD):
            gate_XI, up_XI = F.linear(rows_XD, gate_up_E2ID[expert]).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate_XI) * up_XI, down_EDI[expert]))
    return torch.cat(parts)


def _grouped(x_RD: Tensor, counts_E: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Tensor:
    ends_E = counts_E.cumsum(0).to(torch.int32)
    with torch.autocast("cuda", enabled=False):
        x_RD = x_RD.bfloat16()
        gate_up_R2I = torch._grouped_mm(  # noqa: SLF001 - the only grouped product there is
            x_RD, gate_up_E2ID.bfloat16().transpose(1, 2), offs=ends_E
        )
        gate_RI, up_RI = gate_up_R2I.chunk(2, dim=-1)
        inner_RI = F.silu(gate_RI) * up_RI
        return torch._grouped_mm(inner_RI, down_EDI.bfloat16().transpose(1, 2), offs=ends_E)  # noqa: SLF001
