"""The product of a mixture's routed experts.

    y_t = sum over k of weights_tk * down_e( silu(gate_e x_t) * (up_e x_t) ),   e = expert_ids_tk

Rows are laid out expert by expert, so that each expert is one matrix product over its own rows:

    x_TD -- one row a choice --> x_RD -- E products --> [R, 2I] -- silu, * --> [R, I]
         -- E products --> y_RD -- back in order --> y_TKD -- weighted sum over K --> y_TD

The E products are one grouped product (CUDA, bfloat16), one batched product over experts padded
to equal numbers of rows (few rows: decoding), or a loop over the experts. All are differentiable.
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
        can_group = all(_fits_grouped_product(w) for w in (gate_up_E2ID, down_EDI))
        layout = _lay_out(expert_ids_TK, gate_up_E2ID.shape[0], can_group=can_group)
        x_RD = x_TD.index_select(0, layout.token_R)
        gate_RI, up_RI = layout.product(x_RD, gate_up_E2ID).chunk(2, dim=-1)
        y_RD = layout.product(functional.silu(gate_RI) * up_RI, down_EDI)
        y_TKD = y_RD.index_select(0, layout.row_C).view(num_tokens, num_chosen, -1)
        y_TD = torch.bmm(weights_TK[:, None].to(dtype), y_TKD)[:, 0]
    return y_TD.to(weights_TK.dtype if is_autocast else dtype)


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


class DecodeExperts:
    """Router and routed experts for a few rows on a CPU, from weights prepared once.

    With no more choices than experts, those chosen run one by one: nothing but their weights is
    read. More rows run padded to the most chosen expert in two batched products. Matrices lie
    transposed in memory, which makes products of a few rows about 1.3 times as fast.
    """

    def __init__(
        self,
        router_DE: Tensor,
        bias_E: Tensor,
        gate_up_E2ID: Tensor,
        down_EDI: Tensor,
        *,
        num_chosen: int,
        scaling_factor: float,
    ) -> None:
        self.router_DE: Tensor = router_DE
        self.bias_E: Tensor = bias_E
        self.num_chosen: int = num_chosen
        self.scaling_factor: float = scaling_factor
        self.gate_up_ED2I: Tensor = gate_up_E2ID.transpose(1, 2).contiguous()
        self.down_EID: Tensor = down_EDI.transpose(1, 2).contiguous()
        self.gate_up: tuple[Tensor, ...] = gate_up_E2ID.unbind()
        self.down: tuple[Tensor, ...] = down_EDI.unbind()
        self.gate_up_t: tuple[Tensor, ...] = self.gate_up_ED2I.unbind()
        self.down_t: tuple[Tensor, ...] = self.down_EID.unbind()
        self.experts_E: Tensor = torch.arange(len(self.down))

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Output [T, D] of the chosen experts, weighted."""
        scores_TE = torch.mm(x_TD, self.router_DE).sigmoid_()
        ids_TK = (scores_TE + self.bias_E).topk(self.num_chosen, dim=-1, sorted=False)[1]
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK *= self.scaling_factor / weights_TK.sum(dim=-1, keepdim=True)
        if len(x_TD) == 1:
            return self._one(x_TD, ids_TK, weights_TK)
        run = self._chosen if ids_TK.numel() <= len(self.down) else self._padded
        return run(x_TD, ids_TK, weights_TK)

    def _one(self, x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor) -> Tensor:
        ids, x_D = ids_1K[0].tolist(), x_1D[0]
        gate_up_K2I = torch.stack([torch.mv(self.gate_up[expert], x_D) for expert in ids])
        gate_KI, up_KI = gate_up_K2I.chunk(2, dim=-1)
        inner_KI = functional.silu(gate_KI).mul_(up_KI).mul_(weights_1K.t())
        y_D = torch.mv(self.down[ids[0]], inner_KI[0])
        for expert, inner_I in zip(ids[1:], inner_KI[1:], strict=True):
            y_D.addmv_(self.down[expert], inner_I)
        return y_D[None]

    def _chosen(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ids_C = ids_TK.flatten()
        order_C = ids_C.argsort()
        token_C = order_C.div(self.num_chosen, rounding_mode="floor")
        counts_E: list[int] = ids_C.bincount(minlength=len(self.down)).tolist()
        experts = [expert for expert, count in enumerate(counts_E) if count]
        counts = [counts_E[expert] for expert in experts]
        x_CD = x_TD.index_select(0, token_C)
        gate_up = [
            torch.mm(x, self.gate_up_t[expert])
            for expert, x in zip(experts, x_CD.split_with_sizes(counts), strict=True)
        ]
        gate_CI, up_CI = torch.cat(gate_up).chunk(2, dim=-1)
        inner_CI = functional.silu(gate_CI).mul_(up_CI)
        inner_CI *= weights_TK.flatten().index_select(0, order_C)[:, None]
        y = [
            torch.mm(inner, self.down_t[expert])
            for expert, inner in zip(experts, inner_CI.split_with_sizes(counts), strict=True)
        ]
        return torch.zeros_like(x_TD).index_add_(0, token_C, torch.cat(y))

    def _padded(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        num_experts, width = len(self.down), x_TD.shape[1]
        sorted_C, order_C = ids_TK.flatten().sort(stable=True)
        starts_E = torch.searchsorted(sorted_C, self.experts_E)
        place_C = torch.arange(len(order_C)) - starts_E.index_select(0, sorted_C)
        most = int(place_C.max()) + 1
        row_C = sorted_C * most + place_C
        token_C = order_C.div(self.num_chosen, rounding_mode="floor")
        x_RD = x_TD.new_zeros(num_experts * most, width)
        x_RD.index_copy_(0, row_C, x_TD.index_select(0, token_C))
        gate_up = torch.bmm(x_RD.view(num_experts, most, width), self.gate_up_ED2I)
        gate, up = gate_up.chunk(2, dim=-1)
        y_RD = torch.bmm(functional.silu(gate).mul_(up), self.down_EID).flatten(0, 1)
        y_CD = y_RD.index_select(0, row_C)
        y_CD *= weights_TK.flatten().index_select(0, order_C)[:, None]
        return torch.zeros_like(x_TD).index_add_(0, token_C, y_CD)
