"""Attention of packed sequences by our Triton kernels, forward and backward.

    queries of s2:  |  tile  |  tile  | ti |      keys of s0, the prefix of s1 and s2:  |  tile  |
    each sees       | s0, whole | own, up to the diagonal |       each is seen by  | own | s1 s2 |

One program makes one tile of one head: of queries (output; their gradient) or of keys (gradients of
keys and values), so nothing is added up in memory and results are the same each time. Keys of a
prefix are read where they lie, and values keep their own width. Tiles of one sequence follow each
other, for they read the same; the longest work comes first, which keeps the end short. A tile may
read rows of the next sequence and weigh them with 0: what is not finite spoils its neighbour too.
"""

# Shapes: T = packed tokens, H = heads, K = width of a key, V = of a value, N = sequences.

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swarm_sdk.model_backend.kernels import fused

LEAST_PART = 16
"""Columns that a product needs."""
ALIGN_BYTES = 16
"""Rows and heads start at multiples of this."""
HALF = (torch.bfloat16, torch.float16)
WIDEST_KEY, WIDEST_VALUE = 192, 128
"""Wider heads need more memory than a processor of Hopper's shares."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How one kernel cuts its work."""

    queries: int
    keys: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys} w{self.warps} s{self.stages}"


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the three kernels cut theirs."""

    forward: Tile
    backward_queries: Tile
    backward_keys: Tile

    @staticmethod
    def of(width: int) -> Tiles:
        """Shapes for keys of ``width`` that fit the registers."""
        return NARROW if width <= WIDEST_NARROW else WIDE

    def __str__(self) -> str:
        return f"{self.forward}, dq {self.backward_queries}, dkv {self.backward_keys}"


WIDE = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 2))
NARROW = Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
WIDEST_NARROW = 96
"""Widest keys for which small tiles are taken, several programs a processor; ours."""


class Work:
    """Lists of tiles of packed sequences, made once for each size of tile.

    ``prefix_of`` names earlier sequences, as in ``Packing``.
    """

    def __init__(
        self, seq_lens: Sequence[int], prefix_of: Sequence[int | None], device: torch.device
    ) -> None:
        self.device: torch.device = device
        self.lengths_N: np.ndarray = np.asarray(seq_lens, dtype=np.int64)
        self.starts_N: np.ndarray = self.lengths_N.cumsum() - self.lengths_N
        before = [-1 if one is None else one for one in prefix_of] or [-1] * len(seq_lens)
        self.before_N: np.ndarray = np.asarray(before, dtype=np.int64)
        self.has_prefix: bool = bool((self.before_N >= 0).any())
        self._made: dict[tuple[str, int], Tensor] = {}

    def of_queries(self, size: int) -> Tensor:
        """Tiles of ``size`` queries: row, end, start of the own keys, start and end of a prefix's.

        Row by row int32 [tiles, 5].
        """
        if ("queries", size) not in self._made:
            before_N = self.before_N.clip(0)
            before_lens_N = np.where(self.before_N < 0, 0, self.lengths_N[before_N])
            sequence, row = self._cut(size, self.lengths_N + before_lens_N, is_last_first=True)
            starts_N, before_starts_N = self.starts_N, self.starts_N[before_N]
            columns_N = (
                starts_N + self.lengths_N,
                starts_N,
                before_starts_N,
                before_starts_N + before_lens_N,
            )
            columns = [row, *(one[sequence] for one in columns_N)]
            self._made["queries", size] = self._moved(np.stack(columns, axis=1))
        return self._made["queries", size]

    def of_keys(self, size: int) -> Tensor:
        """Tiles of ``size`` keys: row, end, first and last of ``ranges``; int32 [tiles, 4]."""
        if ("keys", size) not in self._made:
            readers_N = self.lengths_N.copy()
            has = self.before_N >= 0
            np.add.at(readers_N, self.before_N[has], self.lengths_N[has])
            sequence, row = self._cut(size, readers_N, is_last_first=False)
            _, first_N = self._ranges
            columns_N = (self.starts_N + self.lengths_N, first_N[:-1], first_N[1:])
            columns = [row, *(one[sequence] for one in columns_N)]
            self._made["keys", size] = self._moved(np.stack(columns, axis=1))
        return self._made["keys", size]

    def ranges(self) -> Tensor:
        """Start and end of queries that see a sequence's keys, int32 [ranges, 2].

        A sequence's own come first; neighbours are one range.
        """
        if ("ranges", 0) not in self._made:
            self._made["ranges", 0] = self._moved(self._ranges[0])
        return self._made["ranges", 0]

    @functools.cached_property
    def _ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """The ranges, and the first of each sequence [N + 1]."""
        ends_N = self.starts_N + self.lengths_N
        of_sequence = [[[start, end]] for start, end in zip(self.starts_N, ends_N, strict=True)]
        for index in np.flatnonzero(self.before_N >= 0):
            found = of_sequence[self.before_N[index]]
            if found[-1][1] == self.starts_N[index]:
                found[-1][1] = ends_N[index]
            else:
                found.append([self.starts_N[index], ends_N[index]])
        counts = [0, *(len(found) for found in of_sequence)]
        return np.concatenate(of_sequence), np.cumsum(counts)

    def _cut(
        self, size: int, work_N: np.ndarray, *, is_last_first: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sequence and first row of each tile, sequences with most work first."""
        order = np.argsort(-work_N, kind="stable")
        counts = -(-self.lengths_N[order] // size)
        sequence = order.repeat(counts)
        place = np.arange(len(sequence)) - (counts.cumsum() - counts).repeat(counts)
        if is_last_first:
            place = counts.repeat(counts) - 1 - place
        return sequence, self.starts_N[sequence] + place * size

    def _moved(self, numbers: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(numbers.astype(np.int32))
        return tensor.to(self.device, non_blocking=True)


def fits(q_THK: Tensor, k_THK: Tensor, v_THV: Tensor) -> bool:
    """Whether the kernels run where the inputs lie, in their type and at their widths."""
    return (
        q_THK.shape[-1] <= WIDEST_KEY
        and v_THV.shape[-1] <= WIDEST_VALUE
        and all(
            fused.can_load_tiles(x)
            and x.dtype in HALF
            and x.shape[-1] * x.element_size() % ALIGN_BYTES == 0
            for x in (q_THK, k_THK, v_THV)
        )
    )


def attend(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    work: Work,
    *,
    scale: float,
    is_causal: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attention output [T, H, V]; differentiable."""
    tiles = tiles or Tiles.of(q_THK.shape[-1])
    out_THV: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        q_THK, k_THK, v_THV, work, scale, is_causal, tiles
    )
    return out_THV


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        work: Work,
        scale: float,
        is_causal: bool,  # noqa: FBT001
        tiles: Tiles,
    ) -> Tensor:
        q_THK, k_THK, v_THV = (x.contiguous() for x in (q_THK, k_THK, v_THV))
        num_tokens, num_heads, _ = q_THK.shape
        out_THV = torch.empty_like(v_THV)
        log_sums_HT = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q_THK.device)
        tile = tiles.forward
        list_of_tiles = work.of_queries(tile.queries)
        _kernel("forward")[len(list_of_tiles), num_heads](
            q_THK,
            *_by_tiles(tile.keys, k_THK, v_THV),
            out_THV,
            log_sums_HT,
            list_of_tiles,
            num_tokens,
            num_heads,
            scale,
            HAS_PREFIX=work.has_prefix,
            IS_CAUSAL=is_causal,
            **_options(tile, q_THK, v_THV),
        )
        ctx.save_for_backward(q_THK, k_THK, v_THV, out_THV, log_sums_HT)
        ctx.work, ctx.scale, ctx.is_causal, ctx.tiles = work, scale, is_causal, tiles
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, ...]:
        q_THK, k_THK, v_THV, out_THV, log_sums_HT = ctx.saved_tensors
        work, scale, is_causal, tiles = ctx.work, ctx.scale, ctx.is_causal, ctx.tiles
        d_out_THV = gradients[0].contiguous()
        num_tokens, num_heads, _ = q_THK.shape
        d_q_THK, d_k_THK, d_v_THV = (torch.empty_like(x) for x in (q_THK, k_THK, v_THV))
        deltas_HT = torch.empty_like(log_sums_HT)
        tile = tiles.backward_queries
        list_of_tiles = work.of_queries(tile.queries)
        _kernel("backward_queries")[len(list_of_tiles), num_heads](
            q_THK,
            *_by_tiles(tile.keys, k_THK, v_THV),
            out_THV,
            d_out_THV,
            d_q_THK,
            log_sums_HT,
            deltas_HT,
            list_of_tiles,
            num_tokens,
            num_heads,
            scale,
            HAS_PREFIX=work.has_prefix,
            IS_CAUSAL=is_causal,
            **_options(tile, q_THK, v_THV),
        )
        tile = tiles.backward_keys
        list_of_tiles = work.of_keys(tile.keys)
        _kernel("backward_keys")[len(list_of_tiles), num_heads](
            *_by_tiles(tile.queries, q_THK),
            k_THK,
            v_THV,
            *_by_tiles(tile.queries, d_out_THV),
            d_k_THK,
            d_v_THV,
            log_sums_HT,
            deltas_HT,
            list_of_tiles,
            work.ranges(),
            num_tokens,
            num_heads,
            scale,
            IS_CAUSAL=is_causal,
            **_options(tile, q_THK, v_THV),
        )
        return d_q_THK, d_k_THK, d_v_THV, None, None, None, None


def parts_of(width: int) -> tuple[int, int]:
    """Two powers of two, the second possibly none, that hold ``width`` columns."""
    first = 1 << width.bit_length() - 1
    if first < LEAST_PART or first == width:
        return max(first, LEAST_PART), 0
    return first, max(LEAST_PART, 1 << (width - first - 1).bit_length())


def _by_tiles(rows: int, *inputs: Tensor) -> list[Any]:
    """What the kernels need to read inputs by tiles of ``rows``, two parts each."""
    made: list[Any] = []
    for x in inputs:
        first, second = parts_of(x.shape[-1])
        flat = x.flatten(1)
        one = fused.tiles_of(flat, [rows, first])
        made += [one, fused.tiles_of(flat, [rows, second]) if second else one]
    return made


def _options(tile: Tile, q_THK: Tensor, v_THV: Tensor) -> dict[str, int]:
    made = {"QUERIES": tile.queries, "KEYS": tile.keys}
    for name, x in (("K", q_THK), ("V", v_THV)):
        first, second = parts_of(x.shape[-1])
        made |= {name: x.shape[-1], f"{name}0": first, f"{name}1": second}
    return made | {"num_warps": tile.warps, "num_stages": tile.stages}


def _kernel(name: str) -> Any:
    return getattr(import_module("swarm_sdk.model_backend.kernels.attention_triton"), name)
