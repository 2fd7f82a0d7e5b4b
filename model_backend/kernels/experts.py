"""The product of a mixture's routed experts.

    y_t = sum over k of weights_tk * down_e( silu(gate_e x_t) * (up_e x_t) ),   e = expert_ids_tk

Rows are laid out expert by expert, so that each expert is one matrix product over its own rows:

    x_TD -- one row a choice --> x_RD -- E products --> [R, 2I] -- silu, * --> [R, I]
         -- E products --> y_RD -- back in order --> y_TKD -- weighted sum over K --> y_TD

The E products are one grouped product (CUDA, bfloat16), one batched product over experts padded
to equal numbers of rows (few rows: decoding), or a loop over the experts. On CUDA, where there are
few experts, every token passes all of them instead: more to compute, and a tenth of the operations
to start. All are differentiable.
Under autocast the products run in its dtype, else in that of ``x_TD``.
"""

# Shapes: T = tokens, K = experts a token, C = T*K choices, D = hidden, I = inner width,
# E = experts, R = rows of the layout (C, or more where experts are padded), A -> B = widths of
# one product.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

GROUPED_ALIGN_BYTES = 16
"""Rows of a grouped product start at multiples of this."""
MAX_PADDING = 4
"""Rows after padding, as a multiple of the choices. Measured on 2 cores, 256 x 256 experts: a
batched product over 16 rows an expert takes as long as a loop over 4."""
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
    with torch.autocast(device_type, enabled=False):
        x_TD, gate_up_E2ID, down_EDI = (w.to(dtype) for w in (x_TD, gate_up_E2ID, down_EDI))
        if x_TD.is_cuda and are_few(gate_up_E2ID.shape[0], num_chosen):
            y_TD = run_all_experts(x_TD, expert_ids_TK, weights_TK, gate_up_E2ID, down_EDI)
            return y_TD.to(weights_TK.dtype if is_autocast else dtype)
        can_group = all(_fits_grouped_product(w) for w in (gate_up_E2ID, down_EDI))
        layout = _lay_out(expert_ids_TK, gate_up_E2ID.shape[0], can_group=can_group)
        x_RD = x_TD.index_select(0, layout.token_R)
        gate_RI, up_RI = layout.product(x_RD, gate_up_E2ID).chunk(2, dim=-1)
        y_RD = layout.product(functional.silu(gate_RI) * up_RI, down_EDI)
        y_TKD = y_RD.index_select(0, layout.row_C).view(num_tokens, num_chosen, -1)
        y_TD = torch.bmm(weights_TK[:, None].to(dtype), y_TKD)[:, 0]
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


def are_few(num_experts: int, num_chosen: int) -> bool:
    """Whether passing all experts costs little more than passing the chosen ones."""
    return num_experts <= MAX_PADDING * num_chosen


def waits_for_the_device(weight: Tensor, num_experts: int, num_chosen: int) -> bool:
    """Whether ``run_experts`` reads counts back from the device that holds ``weight``."""
    return not (are_few(num_experts, num_chosen) or _fits_grouped_product(weight))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which token each row holds, which row each choice has, and where experts end."""

    token_R: Tensor
    row_C: Tensor
    ends_E: Tensor | None
    """Ends of the experts' rows as int32, for a grouped product."""
    rows_per_expert: int | list[int]
    """One number where all experts are padded to it."""

    def product(self, x_RA: Tensor, w_EBA: Tensor) -> Tensor:
        """Return ``w[expert of the row] x`` [R, B] for every row."""
        if self.ends_E is not None:
            return functional.grouped_mm(x_RA, w_EBA.transpose(1, 2), offs=self.ends_E)
        if isinstance(self.rows_per_expert, int):
            x = x_RA.view(w_EBA.shape[0], self.rows_per_expert, -1)
            return torch.bmm(x, w_EBA.transpose(1, 2)).flatten(0, 1)
        pairs = zip(x_RA.split_with_sizes(self.rows_per_expert), w_EBA.unbind(), strict=True)
        return torch.cat([functional.linear(x, w_BA) for x, w_BA in pairs if x.shape[0]])


def _lay_out(expert_ids_TK: Tensor, num_experts: int, *, can_group: bool) -> _Layout:
    device, num_chosen = expert_ids_TK.device, expert_ids_TK.shape[1]
    sorted_C, order_C = expert_ids_TK.flatten().sort(stable=True)
    experts_E = torch.arange(num_experts, device=device)
    ends_E = torch.searchsorted(sorted_C, experts_E, right=True)
    place_C = torch.arange(order_C.shape[0], device=device)
    row_C = torch.empty_like(order_C)
    if can_group:
        row_C.scatter_(0, order_C, place_C)
        return _Layout(order_C // num_chosen, row_C, ends_E.to(torch.int32), [])

    ends = ends_E.tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    most, num_choices = max(counts), order_C.shape[0]
    is_padded = most <= MAX_PADDED_ROWS and num_experts <= num_choices
    if is_padded and num_experts * most <= MAX_PADDING * num_choices:
        starts_E = ends_E - torch.tensor(counts, device=device)
        row_C.scatter_(
            0, order_C, place_C + (experts_E * most - starts_E).index_select(0, sorted_C)
        )
        token_R = torch.zeros(num_experts * most, dtype=torch.int64, device=device)
        return _Layout(token_R.scatter_(0, row_C, place_C // num_chosen), row_C, None, most)
    row_C.scatter_(0, order_C, place_C)
    return _Layout(order_C // num_chosen, row_C, None, counts)


def _fits_grouped_product(w_EBA: Tensor) -> bool:
    is_aligned = w_EBA.shape[-1] * w_EBA.element_size() % GROUPED_ALIGN_BYTES == 0
    return w_EBA.is_cuda and w_EBA.dtype == torch.bfloat16 and is_aligned
