"""The hashes that SGLang tells of its tensors (``/weights_checker``, 0.5.23), computed here.

    server on a CPU   the first 8 bytes of SHA-256
    server on a GPU   by a kernel of its own, over words of 4 bytes, in tiles of 8192 words:
                      tile   two sums of mix(word ^ f(place of the word)), one for each of two f;
                             each ^ the tensor's bytes, mixed again; together a number of 64 bits
                      whole  the sum of the tiles, finished as SplitMix64 does
                      mix    the finish of MurmurHash3 for 32 bits

What a server's hash is depends on the server's device, not on ours: the second is plain torch, on
whatever device the tensor is.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

TILE_WORDS: Final = 8192
CHUNK_WORDS: Final = 2**11 * TILE_WORDS
"""Words hashed at once: the intermediates are a few times 64 MiB."""
SEED: Final = 0x243F6A88
# Of f(place) = (place * multiplier + seed) ^ rotated(place, bits), for both halves.
PLACES: Final = (
    (0x27D4EB2D, SEED, 15),
    (0x165667B1, (SEED * 0x9E3779B1) ^ 0xDEADBEEF, 13),
)
_64_BITS: Final = 2**64 - 1


def checksum(tensor: Tensor, *, on_gpu: bool = False) -> str:
    """SGLang's hash of a tensor, in hex, as a server on a GPU or on another device tells it."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if on_gpu:
        return f"{_hashed_in_tiles(content):016x}"
    return hashlib.sha256(content.cpu().numpy().data).hexdigest()[:16]


def _hashed_in_tiles(content: Tensor) -> int:
    if not content.numel():
        return 0
    missing = -content.numel() % 4
    if missing:
        content = torch.cat([content, content.new_zeros(missing)])
    if content.storage_offset() % 4:
        content = content.clone()
    words = content.view(torch.int32)
    num_bytes, found = _signed(content.numel()), 0
    for begin in range(0, len(words), CHUNK_WORDS):
        part = words[begin : begin + CHUNK_WORDS]
        place = torch.arange(len(part), dtype=torch.int32, device=part.device)
        place += _signed(begin)
        halves = []
        for multiplier, seed, bits in PLACES:
            turned = (place << bits) | _shifted(place, 32 - bits)
            mixed = _mixed(part ^ (place * _signed(multiplier) + _signed(seed)) ^ turned)
            mixed = torch.nn.functional.pad(mixed, (0, -len(mixed) % TILE_WORDS))
            sums = mixed.view(-1, TILE_WORDS).sum(1, dtype=torch.int32)
            halves.append(_mixed(sums ^ num_bytes).to(torch.int64) & (2**32 - 1))
        found += int(((halves[0] << 32) | halves[1]).sum())
    return _finished(found)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _shifted(x, 13)) * _signed(0xC2B2AE35)
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch repeats the sign of an int32."""
    shifted: Tensor = (x >> bits) & (2 ** (32 - bits) - 1)
    return shifted


def _signed(number: int) -> int:
    """The int32 with the lowest 32 bits of ``number``."""
    return (number + 2**31) % 2**32 - 2**31


def _finished(x: int) -> int:
    x &= _64_BITS
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> bits)) * factor & _64_BITS
    return x
