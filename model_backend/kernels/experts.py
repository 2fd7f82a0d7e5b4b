"""The product of a mixture's routed experts, forward and backward.

    y_t = sum over k of down_e( weights_tk * silu(gate_e x_t) * (up_e x_t) ),   e = expert_ids_tk

Rows are laid out expert by expert, so that each expert is one matrix product over its own rows:

    x_TD -- one row a choice --> x_RD -- E products --> h [R, 2I] -- silu, *, * weight --> a [R, I]
         -- E products --> y_RD -- sum of each token's rows --> y_TD

    dy_TD -- one row a choice --> dy_RD -- E products --> da -- SwiGLU backward --> dh, a, dweights
         dh -- E products --> dx_RD -- sum of each token's rows --> dx_TD
         d down = sums of dy a^T,     d gate_up = sums of dh x^T

The weight stands before the second product (the same number: that product is linear), so that its
gradient is a by-product of da, and y_RD need not be kept. Kept are h and the layout; x and a are
made again. The products are those of ``grouped.py``: padded to equal numbers of rows where there
are few (decoding), grouped on CUDA, else a loop. On CUDA, where experts and tokens are few, every
token passes all experts instead: more to compute, and a tenth of the operations to start. Under
autocast the products run in its dtype, else in that of ``x_TD``.
"""

# Shapes: T = tokens, K = experts a token, C = T*K choices, D = hidden, I = inner width,
# E = experts, R = rows of the layout (C, or more where experts are padded).

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swarm_sdk.model_backend.kernels import fused
from swarm_sdk.model_backend.kernels.grouped import (
    Batched,
    Grouped,
    Looped,
    Mixed,
    Products,
    Tiled,
    TileShape,
)

MAX_PADDING = 4
"""Rows after padding, as a multiple of the choices. Measured on 2 cores, 256 x 256 experts: a
batched product over 16 rows an expert takes as long as a loop over 4."""
FEW_TOKENS = 1_024
"""On CUDA; ours, measured with 16 experts of 256 x 128."""
MAX_PADDED_ROWS = 32
"""Rows of one expert above which padding gains nothing."""


def run_experts_reference(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """Output [T, D], token by token and expert by expert: the truth that ``run_experts`` keeps."""
    y_TD = torch.zeros_like(x_TD)
    for token, experts in enumerate(expert_ids_TK.tolist()):
        for place, expert in enumerate(experts):
            gate_I, up_I = (gate_up_E2ID[expert] @ x_TD[token]).chunk(2)
            y_D = down_EDI[expert] @ (functional.silu(gate_I) * up_I)
            y_TD[token] += (weights_TK[token, place] * y_D).to(y_TD.dtype)
    return y_TD


def run_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """Output [T, D] of the chosen experts in the dtype of ``x_TD``.

    ``expert_ids_TK`` is int64, ``weights_TK`` float32; rows of ``gate_up_E2ID`` are gate first.
    """
    device_type = x_TD.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else x_TD.dtype
    num_tokens, num_chosen = expert_ids_TK.shape
    y_TD: Tensor
    with torch.autocast(device_type, enabled=False):
        x_TD, gate_up_E2ID, down_EDI = (w.to(dtype) for w in (x_TD, gate_up_E2ID, down_EDI))
        if x_TD.is_cuda and are_few(gate_up_E2ID.shape[0], num_chosen, num_tokens):
            y_TD = run_all_experts(x_TD, expert_ids_TK, weights_TK, gate_up_E2ID, down_EDI)
            return y_TD.to(weights_TK.dtype if is_autocast else dtype)
        layout = lay_out(expert_ids_TK, gate_up_E2ID, down_EDI)
        y_TD = _Experts.apply(  # type: ignore[no-untyped-call]
            x_TD, weights_TK, gate_up_E2ID, down_EDI, layout
        )
    return y_TD.to(weights_TK.dtype if is_autocast else dtype)


def run_all_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """``run_experts`` by every expert over every token, those not chosen with weight 0.

    Two products with the experts side by side; nothing depends on how many tokens each has.
    """
    num_tokens, num_experts = x_TD.shape[0], gate_up_E2ID.shape[0]
    weights_TE = weights_TK.new_zeros(num_tokens, num_experts).scatter(1, expert_ids_TK, weights_TK)
    gate_up_TC = functional.linear(x_TD, gate_up_E2ID.flatten(0, 1))
    gate_up_TE2I = gate_up_TC.view(num_tokens, num_experts, -1)
    gate_TEI, up_TEI = gate_up_TE2I.chunk(2, dim=-1)
    inner_TEI = functional.silu(gate_TEI) * up_TEI * weights_TE[..., None].to(x_TD.dtype)
    down_CD = down_EDI.transpose(1, 2).flatten(0, 1)
    return torch.mm(inner_TEI.flatten(1), down_CD)


def are_few(num_experts: int, num_chosen: int, num_tokens: int) -> bool:
    """Whether to pass all experts costs less than to sort out the chosen ones."""
    return num_experts <= MAX_PADDING * num_chosen and num_tokens <= FEW_TOKENS


def waits_for_the_device(
    gate_up_E2ID: Tensor, down_EDI: Tensor, num_chosen: int, num_tokens: int
) -> bool:
    """Whether ``run_experts`` over so many tokens reads counts back from the device."""
    weights = (gate_up_E2ID, down_EDI)
    return not (
        are_few(len(gate_up_E2ID), num_chosen, num_tokens)
        or Grouped.fits(*weights)
        or Tiled.fits(*weights)
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """Which token each row holds, which row each choice has, and how to multiply them."""

    token_R: Tensor
    row_C: Tensor
    products: Products


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        gate_up_E2ID: Tensor,
        down_EDI: Tensor,
        layout: Layout,
    ) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weights_R = x_TD.new_zeros(layout.token_R.shape, dtype=wide)
        weights_R.scatter_(0, layout.row_C, weights_TK.flatten().to(wide))
        x_RD = x_TD.index_select(0, layout.token_R)
        h_R2I = layout.products.apply(x_RD, gate_up_E2ID)
        a_RI = fused.swiglu(h_R2I, weights_R) if fused.can_run(x_TD) else swiglu(h_R2I, weights_R)
        y_RD = layout.products.apply(a_RI, down_EDI)
        ctx.save_for_backward(x_TD, weights_R, gate_up_E2ID, down_EDI, h_R2I)
        ctx.layout, ctx.weights_like = layout, (weights_TK.shape, weights_TK.dtype)
        return _combined(y_RD, layout, weights_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        [d_y_TD] = gradients
        x_TD, weights_R, gate_up_E2ID, down_EDI, h_R2I = ctx.saved_tensors
        layout, (shape, dtype) = ctx.layout, ctx.weights_like
        needs_x, needs_weights, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        d_x_TD = d_weights_TK = d_gate_up_E2ID = d_down_EDI = None
        d_y_RD = d_y_TD.index_select(0, layout.token_R)
        d_a_RI = layout.products.pull(d_y_RD, down_EDI)
        turn = fused.swiglu_backward if fused.can_run(x_TD) else swiglu_backward
        d_h_R2I, d_weights_R, a_RI = turn(h_R2I, weights_R, d_a_RI)
        if needs_down:
            d_down_EDI = layout.products.outer(d_y_RD, a_RI)
        del d_y_RD, d_a_RI, a_RI
        if needs_weights:
            d_weights_TK = d_weights_R.index_select(0, layout.row_C).view(shape).to(dtype)
        if needs_gate_up:
            x_RD = x_TD.index_select(0, layout.token_R)
            d_gate_up_E2ID = layout.products.outer(d_h_R2I, x_RD)
            del x_RD
        if needs_x:
            d_x_RD = layout.products.pull(d_h_R2I, gate_up_E2ID)
            d_x_TD = _combined(d_x_RD, layout, shape[1])
        return d_x_TD, d_weights_TK, d_gate_up_E2ID, d_down_EDI, None


def lay_out(expert_ids_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Layout:
    """The rows of the choices, expert by expert; waits for no device where products are grouped."""
    device, num_chosen = expert_ids_TK.device, expert_ids_TK.shape[1]
    num_experts = gate_up_E2ID.shape[0]
    sorted_C, order_C = expert_ids_TK.flatten().sort(stable=True)
    experts_E = torch.arange(num_experts, device=device)
    ends_E = torch.searchsorted(sorted_C, experts_E, right=True)
    num_choices = order_C.shape[0]
    place_C = torch.arange(num_choices, device=device)
    row_C = torch.empty_like(order_C)
    products = _waiting_for_no_device(ends_E.int(), num_choices, gate_up_E2ID, down_EDI)
    if products is not None:
        row_C.scatter_(0, order_C, place_C)
        return Layout(order_C // num_chosen, row_C, products)

    ends = ends_E.tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    most = max(counts)
    is_padded = most <= MAX_PADDED_ROWS and num_experts <= num_choices
    if is_padded and num_experts * most <= MAX_PADDING * num_choices:
        starts_E = ends_E - torch.tensor(counts, device=device)
        row_C.scatter_(
            0, order_C, place_C + (experts_E * most - starts_E).index_select(0, sorted_C)
        )
        token_R = torch.zeros(num_experts * most, dtype=torch.int64, device=device)
        token_R.scatter_(0, row_C, place_C // num_chosen)
        return Layout(token_R, row_C, Batched(num_experts))
    row_C.scatter_(0, order_C, place_C)
    return Layout(order_C // num_chosen, row_C, Looped(counts))


def _waiting_for_no_device(
    ends_E: Tensor, num_rows: int, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Products | None:
    """The first that can hold the matrices, of those that read on the device where experts end."""
    if Mixed.fits(gate_up_E2ID, down_EDI):
        return Mixed(ends_E, num_rows, TileShape.of(gate_up_E2ID.dtype))
    if Grouped.fits(gate_up_E2ID, down_EDI):
        return Grouped(ends_E)
    if Tiled.fits(gate_up_E2ID, down_EDI):
        return Tiled(ends_E, num_rows, TileShape.of(gate_up_E2ID.dtype))
    return None


def _combined(y_RD: Tensor, layout: Layout, num_chosen: int) -> Tensor:
    if fused.can_run(y_RD):
        return fused.combine(y_RD, layout.row_C, num_chosen)
    return combine(y_RD, layout.row_C, num_chosen)


def swiglu(h_R2I: Tensor, weights_R: Tensor) -> Tensor:
    """``silu(gate) * up * weight`` [R, I]; gate is the first half of ``h``."""
    gate_RI, up_RI = h_R2I.chunk(2, dim=-1)
    return functional.silu(gate_RI).mul_(up_RI).mul_(weights_R[:, None].to(h_R2I.dtype))


def swiglu_backward(
    h_R2I: Tensor, weights_R: Tensor, d_a_RI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h [R, 2I] and of the weights [R], and the output again [R, I]."""
    gate_RI, up_RI = h_R2I.chunk(2, dim=-1)
    weights_R1 = weights_R[:, None].to(h_R2I.dtype)
    silu_RI = functional.silu(gate_RI)
    a_RI = silu_RI * up_RI
    d_weights_R = torch.linalg.vecdot(d_a_RI, a_RI).to(weights_R.dtype)
    d_a_RI = d_a_RI * weights_R1
    d_h_R2I = torch.empty_like(h_R2I)
    d_gate_RI, d_up_RI = d_h_R2I.chunk(2, dim=-1)
    torch.mul(d_a_RI, silu_RI, out=d_up_RI)
    d_gate_RI.copy_(torch.ops.aten.silu_backward(d_a_RI.mul_(up_RI), gate_RI))
    return d_h_R2I, d_weights_R, a_RI.mul_(weights_R1)


def combine(y_RD: Tensor, row_C: Tensor, num_chosen: int) -> Tensor:
    """The sum [T, D] of each token's rows."""
    return y_RD.index_select(0, row_C).view(-1, num_chosen, y_RD.shape[1]).sum(1)
