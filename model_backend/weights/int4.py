"""INT4 weights of the routed experts, as the released checkpoint packs them.

    w_OI  --groups of 32 along I-->  scale_OG (bf16), codes_OI in -8 … 7      w = bf16(code * scale)
    codes --8 an int32, the first in the lowest bits, each + 8-->  packed [O, I/8]

    NAME.weight_packed [O, I/8] int32    NAME.weight_scale [O, I/32] bf16    NAME.weight_shape [2]

This is the "pack-quantized" format of the compressed-tensors library (symmetric, group 32, no
zero point), which SGLang and ``transformers`` read. K2.5 quantises only its routed experts.

``quantize`` takes the scale amax / 7.5 of that library's min-max observer, rounded to bf16, but
first looks whether a group lies on some grid bf16(code * scale) exactly. So what was INT4 once and
was dequantised is found again without loss, though the rule of the scale that made it is unknown
(weights trained for INT4 have scales of their own). Ours; the report is silent about it.
"""

# Shapes: O = rows, I = columns, G = I/32 groups of a row, N = groups of all rows, K = 32,
# C = scales that are tried, P = pairs of a group and a scale that survive the first look.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swarm_sdk.model_backend.weights.layout import CODES_PER_WORD, GROUP

PEEK = 4
"""Numbers of a group that are looked at before all are: weights that never were INT4 fail here."""
GRIDS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (8, (0,)),
    (7, (0, -1, 1)),
    (6, (0, -1, 1)),
    (5, (0, -1, 1)),
    (4, (0,)),
)
"""Largest code of a group, and steps in bf16 from amax / code to the scale: the product with a code
that is no power of two is rounded, by less than one step. Smaller codes are doubled on a finer
grid."""


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """One matrix: ``packed`` [O, I/8] int32 and ``scale`` [O, I/32] bf16."""

    packed: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.packed.shape[0], self.packed.shape[1] * CODES_PER_WORD


def pack(codes_OI: Tensor) -> Tensor:
    """Pack codes -8 … 7 (any integer type) into int32 [O, I/8]; I is a multiple of 8."""
    nibbles_OI = (codes_OI + 8).to(torch.uint8)
    bytes_OJ = nibbles_OI[:, 0::2] | (nibbles_OI[:, 1::2] << 4)
    return bytes_OJ.contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """Return the codes -8 … 7 as int8 [O, I] of ``packed`` [O, I/8]."""
    bytes_OJ = packed.contiguous().view(torch.uint8)
    nibbles_OI = torch.stack((bytes_OJ & 15, bytes_OJ >> 4), dim=-1).flatten(1)
    return nibbles_OI.to(torch.int8) - 8


def quantize(w_OI: Tensor) -> Int4Weight:
    """Quantise a matrix whose columns are a multiple of 32; float types are rounded to bf16 first.

    ``quantize(dequantize(x))`` dequantises to the same numbers as ``x``, for every ``x`` with
    finite scales above zero.
    """
    w_NK = w_OI.to(torch.bfloat16).float().reshape(-1, GROUP)
    amax_N = w_NK.abs().amax(dim=1)
    scale_N = (amax_N / 7.5).to(torch.bfloat16).float()
    # Zeros lie on every grid; this scale is the library's, for what underflows as well.
    scale_N[scale_N == 0] = torch.finfo(torch.bfloat16).eps
    scale_NC = _candidates(amax_N)
    is_grid_NC = _on_grid(w_NK[:, None, :PEEK], scale_NC) & (amax_N > 0)[:, None]
    group_P, candidate_P = is_grid_NC.nonzero().unbind(1)
    is_grid_NC[group_P, candidate_P] = _on_grid(w_NK[group_P], scale_NC[group_P, candidate_P])
    is_found_N, first_N = is_grid_NC.to(torch.uint8).max(dim=1)
    scale_N = torch.where(is_found_N > 0, scale_NC.gather(1, first_N[:, None])[:, 0], scale_N)
    codes_OI = _codes(w_NK, scale_N).to(torch.int8).view(w_OI.shape)
    scale_OG = scale_N.to(torch.bfloat16).view(w_OI.shape[0], -1)
    return Int4Weight(pack(codes_OI), scale_OG)


def dequantize(weight: Int4Weight) -> Tensor:
    """Return the matrix [O, I] in bf16: each code times its group's scale, rounded once."""
    codes_OI = unpack(weight.packed).to(torch.bfloat16)
    codes_OGK = codes_OI.view(codes_OI.shape[0], -1, GROUP)
    w_OI: Tensor = (codes_OGK * weight.scale.to(torch.bfloat16)[..., None]).flatten(1)
    return w_OI


def _codes(w_NK: Tensor, scale_N: Tensor) -> Tensor:
    return (w_NK / scale_N[..., None]).round().clamp(-8, 7)


def _on_grid(w_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Whether each group is bf16(code * scale) throughout, for codes -8 … 7."""
    again_NK = (_codes(w_NK, scale_N) * scale_N[..., None]).to(torch.bfloat16).float()
    return (again_NK == w_NK).all(dim=-1) & (scale_N > 0)


def _candidates(amax_N: Tensor) -> Tensor:
    """Return the scales [N, C] of grids whose largest number could be ``amax_N``."""
    bits = [
        (amax_N / code).to(torch.bfloat16).view(torch.int16) + step
        for code, steps in GRIDS
        for step in steps
    ]
    return torch.stack(bits, dim=1).clamp(min=0).view(torch.bfloat16).float()
