"""Products of rows that lie expert by expert with the experts' matrices, and both gradients.

    apply    y[rows of e] = x[rows of e] w_e^T        [R, A] -> [R, B],  w is [E, B, A]
    pull     x[rows of e] = y[rows of e] w_e          [R, B] -> [R, A]
    outer    w_e = y[rows of e]^T x[rows of e]        [R, B], [R, A] -> [E, B, A]

Four ways, one interface: PyTorch's grouped product (CUDA, bfloat16), Triton's (CUDA), one batched
product where every expert has equally many rows, and a loop. The first two read where experts end
on the device, so the host never waits; ``Mixed`` takes each of them for what it does faster.
"""

# Shapes: R = rows, E = experts, A and B = widths of one product.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from swarm_sdk.model_backend.kernels import fused

WIDE = 1_024
"""Least width of a matrix for which ``Mixed`` is taken; ours."""
ALIGN_BYTES = 16
"""Rows of a grouped product start at multiples of this."""


class Products(Protocol):
    """One way to multiply rows that lie expert by expert."""

    def apply(self, x_RA: Tensor, w_EBA: Tensor) -> Tensor:
        """``w x`` [R, B] of each row."""
        ...

    def pull(self, y_RB: Tensor, w_EBA: Tensor) -> Tensor:
        """``w^T y`` [R, A] of each row: the gradient of ``apply`` in its rows."""
        ...

    def outer(self, y_RB: Tensor, x_RA: Tensor) -> Tensor:
        """Sums of ``y x^T`` [E, B, A]: the gradient of ``apply`` in its matrices."""
        ...


@dataclass(frozen=True, slots=True)
class Looped:
    """One product an expert; ``counts`` are their rows."""

    counts: Sequence[int]

    def apply(self, x_RA: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        y_RB = x_RA.new_empty(x_RA.shape[0], w_EBA.shape[1])
        for rows, w_BA in zip(self._rows(), w_EBA.unbind(), strict=True):
            torch.mm(x_RA[rows], w_BA.t(), out=y_RB[rows])
        return y_RB

    def pull(self, y_RB: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        x_RA = y_RB.new_empty(y_RB.shape[0], w_EBA.shape[2])
        for rows, w_BA in zip(self._rows(), w_EBA.unbind(), strict=True):
            torch.mm(y_RB[rows], w_BA, out=x_RA[rows])
        return x_RA

    def outer(self, y_RB: Tensor, x_RA: Tensor) -> Tensor:
        """See ``Products``."""
        w_EBA = y_RB.new_empty(len(self.counts), y_RB.shape[1], x_RA.shape[1])
        for rows, w_BA in zip(self._rows(), w_EBA.unbind(), strict=True):
            torch.mm(y_RB[rows].t(), x_RA[rows], out=w_BA)
        return w_EBA

    def _rows(self) -> list[slice]:
        rows, start = [], 0
        for count in self.counts:
            rows.append(slice(start, start + count))
            start += count
        return rows


@dataclass(frozen=True, slots=True)
class Batched:
    """One batched product: every expert has equally many rows."""

    num_experts: int

    def apply(self, x_RA: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        return torch.bmm(self._each(x_RA), w_EBA.transpose(1, 2)).flatten(0, 1)

    def pull(self, y_RB: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        return torch.bmm(self._each(y_RB), w_EBA).flatten(0, 1)

    def outer(self, y_RB: Tensor, x_RA: Tensor) -> Tensor:
        """See ``Products``."""
        return torch.bmm(self._each(y_RB).transpose(1, 2), self._each(x_RA))

    def _each(self, x: Tensor) -> Tensor:
        return x.view(self.num_experts, -1, x.shape[-1])


@dataclass(frozen=True, slots=True)
class Grouped:
    """PyTorch's grouped product; ``ends_E`` (int32) are the ends of the experts' rows."""

    ends_E: Tensor

    @staticmethod
    def fits(*matrices: Tensor) -> bool:
        """Whether PyTorch has a kernel for them."""
        return all(
            w.is_cuda and w.dtype == torch.bfloat16 and _is_aligned(w.shape[1:], w)
            for w in matrices
        )

    def apply(self, x_RA: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        return functional.grouped_mm(x_RA, w_EBA.transpose(1, 2), offs=self.ends_E)

    def pull(self, y_RB: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        return functional.grouped_mm(y_RB, w_EBA, offs=self.ends_E)

    def outer(self, y_RB: Tensor, x_RA: Tensor) -> Tensor:
        """See ``Products``."""
        return functional.grouped_mm(y_RB.t(), x_RA, offs=self.ends_E)


@dataclass(frozen=True, slots=True)
class TileShape:
    """How Triton cuts a product."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @staticmethod
    def of(dtype: torch.dtype) -> TileShape:
        """A shape that fits the chip's shared memory."""
        is_wide = dtype.itemsize >= 4
        return TileShape(64, 64, 32, 4, 2) if is_wide else TileShape(128, 256, 64, 8, 3)


class Tiled:
    """Triton's grouped product: rows are cut into tiles of one expert each, without padding.

    PyTorch's kernel works on pairs of 128 rows, so that 341 rows an expert (16,384 tokens of a
    layer of K2.5) cost as much as 512. Float32 is computed as such, not in TF32.
    """

    def __init__(self, ends_E: Tensor, num_rows: int, shape: TileShape) -> None:
        self.shape: TileShape = shape
        num_experts = ends_E.shape[0]
        self.ends_E: Tensor = ends_E
        self.starts_E: Tensor = functional.pad(ends_E[:-1], (1, 0))
        tiles_E = (ends_E - self.starts_E + (shape.m - 1)) // shape.m
        ends_of_tiles_E = tiles_E.cumsum(0)
        self.first_tiles: Tensor = functional.pad(ends_of_tiles_E, (1, 0)).int()
        """First tile of each expert, and behind the last how many there are."""
        most = num_rows // shape.m + num_experts
        tiles = torch.arange(most, device=ends_E.device)
        self.expert_of_tile: Tensor = torch.searchsorted(ends_of_tiles_E, tiles, right=True).int()

    @staticmethod
    def fits(*matrices: Tensor) -> bool:
        """Whether Triton's descriptors can hold them."""
        return all(
            fused.can_load_tiles(w)
            and _is_aligned(w.shape[1:], w)
            and all(size % TileShape.of(w.dtype).k == 0 for size in w.shape[1:])
            for w in matrices
        )

    def apply(self, x_RA: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        return self._product(x_RA, w_EBA, width=w_EBA.shape[1], is_nk=True)

    def pull(self, y_RB: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        return self._product(y_RB, w_EBA, width=w_EBA.shape[2], is_nk=False)

    def outer(self, y_RB: Tensor, x_RA: Tensor) -> Tensor:
        """See ``Products``."""
        shape, num_experts = self.shape, self.ends_E.shape[0]
        sizes = (y_RB.shape[1], x_RA.shape[1])
        w_EBA = y_RB.new_empty(num_experts, *sizes)
        if not len(y_RB):
            return w_EBA.zero_()
        programs = _programs(y_RB)
        fused.kernel("grouped_outer")[programs,](
            fused.tiles_of(y_RB, [shape.k, shape.m]),
            fused.tiles_of(x_RA, [shape.k, shape.n]),
            w_EBA,
            self.starts_E,
            self.ends_E,
            num_experts,
            *sizes,
            PROGRAMS=programs,
            PRECISION="ieee",
            BLOCK_M=shape.m,
            BLOCK_N=shape.n,
            BLOCK_K=shape.k,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        return w_EBA

    def _product(self, x: Tensor, w: Tensor, *, width: int, is_nk: bool) -> Tensor:
        shape = self.shape
        out = x.new_empty(x.shape[0], width)
        if not len(x):
            return out
        programs = _programs(x)
        block = [shape.n, shape.k] if is_nk else [shape.k, shape.n]
        fused.kernel("grouped_product")[programs,](
            fused.tiles_of(x, [shape.m, shape.k]),
            fused.tiles_of(w.flatten(0, 1), block),
            out,
            self.starts_E,
            self.ends_E,
            self.first_tiles,
            self.expert_of_tile,
            w.shape[0],
            width,
            x.shape[1],
            W_IS_NK=is_nk,
            PROGRAMS=programs,
            PRECISION="ieee",
            BLOCK_M=shape.m,
            BLOCK_N=shape.n,
            BLOCK_K=shape.k,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        return out


class Mixed:
    """Rows by Triton's product, matrices by PyTorch's: each where it is the faster one.

    Measured on an H200 at K2.5's widths with 341 rows an expert, per cent of a dense product's
    speed: rows 69 to 77 by Triton and 58 to 63 by PyTorch, matrices 49 and 56 to 60.
    """

    def __init__(self, ends_E: Tensor, num_rows: int, shape: TileShape) -> None:
        self.tiled: Tiled = Tiled(ends_E, num_rows, shape)
        self.grouped: Grouped = Grouped(ends_E)

    @staticmethod
    def fits(*matrices: Tensor) -> bool:
        """Whether both can hold them, and they are as wide as what was measured."""
        is_wide = all(min(w.shape[1:]) >= WIDE for w in matrices)
        return is_wide and Grouped.fits(*matrices) and Tiled.fits(*matrices)

    def apply(self, x_RA: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        return self.tiled.apply(x_RA, w_EBA)

    def pull(self, y_RB: Tensor, w_EBA: Tensor) -> Tensor:
        """See ``Products``."""
        return self.tiled.pull(y_RB, w_EBA)

    def outer(self, y_RB: Tensor, x_RA: Tensor) -> Tensor:
        """See ``Products``."""
        return self.grouped.outer(y_RB, x_RA)


def _programs(x: Tensor) -> int:
    """As many as run at once."""
    if not x.is_cuda:  # Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _is_aligned(sizes: Sequence[int], like: Tensor) -> bool:
    return all(size * like.element_size() % ALIGN_BYTES == 0 for size in sizes)
