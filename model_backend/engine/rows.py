"""Working copies of the keys of decoding sequences, one after the other in memory.

    band of 256     [row of A | row of B | row of C | ... ]      keys 0 .. 255 of each
    band of 512     [row of D | ... ]
    ...

A decoding step reads every key of every sequence in every layer. Gathering them from pages costs
as much as using them, so a sequence keeps a row while it decodes: filled once from its pages, then
one key a step, written here and to its page alike. Bands of doubling capacity keep short sequences
from being padded to the longest one: at most half of a row is padding.
"""

# Shapes: Y = layers, R = rows of a band, C = its capacity in tokens, W = one cached token,
# B = decoding sequences, S = keys.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from swarm_sdk.model_backend.engine.sequence import Sequence

MIN_BAND_TOKENS = 256
MIN_BAND_ROWS = 4


@dataclass(slots=True, eq=False)
class Band:
    """Rows of equal capacity; row i belongs to ``sequences[i]``."""

    capacity_tokens: int
    kv: Tensor
    """[Y, R, C, W]"""
    sequences: list[Sequence] = field(default_factory=list)


class DecodeRows:
    """The rows of all sequences that decode now."""

    def __init__(self, pool: Tensor, slots_of: Callable[[Sequence], Tensor]) -> None:
        self.pool: Tensor = pool
        self.slots_of: Callable[[Sequence], Tensor] = slots_of
        self.bands: dict[int, Band] = {}

    def update(self, decoding: Iterable[Sequence]) -> list[Band]:
        """Give exactly these sequences a row that holds their computed keys; returns the bands."""
        wanted = {id(sequence): sequence for sequence in decoding}
        for band in list(self.bands.values()):
            for row in range(len(band.sequences) - 1, -1, -1):
                sequence = band.sequences[row]
                has_room = sequence.num_computed_tokens < band.capacity_tokens
                if id(sequence) in wanted and has_room:
                    del wanted[id(sequence)]
                else:
                    self._remove(band, row)
            if not band.sequences:
                del self.bands[band.capacity_tokens]
        for sequence in wanted.values():
            self._insert(sequence)
        return [self.bands[capacity] for capacity in sorted(self.bands)]

    def clear(self) -> None:
        """Forget all rows."""
        self.bands.clear()

    def _insert(self, sequence: Sequence) -> None:
        capacity = MIN_BAND_TOKENS
        while capacity <= sequence.num_computed_tokens:
            capacity *= 2
        if capacity not in self.bands:
            self.bands[capacity] = Band(capacity, self._storage(MIN_BAND_ROWS, capacity))
        band = self.bands[capacity]
        row = len(band.sequences)
        if row == band.kv.shape[1]:
            grown = self._storage(2 * row, capacity)
            grown[:, :row] = band.kv
            band.kv = grown
        band.sequences.append(sequence)
        slots_S = self.slots_of(sequence)
        band.kv[:, row, : len(slots_S)] = self.pool.index_select(1, slots_S)

    def _remove(self, band: Band, row: int) -> None:
        """Fill the hole with the last row."""
        last = band.sequences.pop()
        if row < len(band.sequences):
            num_tokens = min(last.num_computed_tokens, band.capacity_tokens)
            band.kv[:, row, :num_tokens] = band.kv[:, len(band.sequences), :num_tokens]
            band.sequences[row] = last

    def _storage(self, num_rows: int, capacity: int) -> Tensor:
        # Zeros: padding is multiplied by a weight of 0, which must not meet a NaN.
        shape = (self.pool.shape[0], num_rows, capacity, self.pool.shape[2])
        return torch.zeros(shape, dtype=self.pool.dtype, device=self.pool.device)
