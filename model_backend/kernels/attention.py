"""Attention of packed sequences in one call, on CUDA.

    q   | s0 ... | s1 .. | s2 ....... |            queries of all sequences end to end
    k v | s0 ... | s0 s1 .. | s0 s2 ....... |      keys of each: with a shared prompt, that first

Each sequence's queries are the last of its keys (``is_causal``), or see all of them. The kernels
take the lengths as numbers on the device, so no new shape costs a new plan: PyTorch's own choice
for bfloat16 on Hopper is cuDNN, which plans anew for every length and made steps of many short
sequences 10 times as long. Half precision runs our own kernels (``tiled_attention.py``), or
FlashAttention-2 where they do not fit or were not measured (pictures), float32 the kernel of
"memory-efficient" attention; all are differentiable.
"""

# Shapes: T = packed queries, S = packed keys, H = heads, K = width of a key, V = of a value,
# N = sequences.

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from swarm_sdk.model_backend.kernels import tiled_attention as tiled
from swarm_sdk.model_backend.kernels.tiled_attention import Tiles, Work

CAUSAL_FROM_THE_END = 2
"""Name of the mask in PyTorch's memory-efficient kernel: the last query sees the last key."""


class Packing:
    """Where each sequence's queries and keys lie; made once for all layers of a pass.

    ``prefix_of`` names the sequence whose keys stand before a sequence's.
    """

    def __init__(
        self,
        seq_lens: Sequence[int],
        device: torch.device,
        prefix_of: Sequence[int | None] = (),
    ) -> None:
        self._device = device
        self.lengths: list[int] = list(seq_lens)
        self._before: list[int | None] = list(prefix_of) or [None] * len(self.lengths)
        self.is_own: bool = all(before is None for before in self._before)
        """Whether no sequence stands behind another."""
        self.max_q: int = max(self.lengths)
        self.max_k: int = max(
            length if before is None else length + self.lengths[before]
            for length, before in zip(self.lengths, self._before, strict=True)
        )

    @functools.cached_property
    def work(self) -> Work:
        """What our own kernels go through."""
        return Work(self.lengths, self._before, self._device)

    @functools.cached_property
    def q_ends(self) -> Tensor:
        """0 and the ends of the sequences' queries [N + 1], int32."""
        return self._moved(_ends_of(self.lengths))

    @functools.cached_property
    def k_ends(self) -> Tensor:
        """The same of their keys [N + 1], where keys are laid out."""
        if self.is_own:
            return self.q_ends
        pairs = zip(self.lengths, self._before, strict=True)
        return self._moved(
            _ends_of([one + (0 if by is None else self.lengths[by]) for one, by in pairs])
        )

    @functools.cached_property
    def key_rows(self) -> Tensor | None:
        """Packed token of each key; ``None`` where keys lie as the queries do."""
        if self.is_own:
            return None
        ends = _ends_of(self.lengths)
        pieces: list[np.ndarray] = []
        for index, before in enumerate(self._before):
            own = [index] if before is None else [before, index]
            pieces += [np.arange(ends[one], ends[one + 1]) for one in own]
        return self._moved(np.concatenate(pieces))

    def _moved(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._device, non_blocking=True)


def _ends_of(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int32)


def packed_attention_reference(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    packing: Packing,
    *,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Sequence by sequence: the truth that ``packed_attention`` keeps."""
    k_SHK, v_SHV = keys_of(k_THK, packing), keys_of(v_THV, packing)
    outs = []
    q_ends, k_ends = packing.q_ends.tolist(), packing.k_ends.tolist()
    for index in range(len(q_ends) - 1):
        q = q_THK[q_ends[index] : q_ends[index + 1]]
        k, v = (x[k_ends[index] : k_ends[index + 1]] for x in (k_SHK, v_SHV))
        logits_HTS = torch.einsum("thk,shk->hts", q, k) * scale
        if is_causal:
            is_seen_TS = torch.ones(logits_HTS.shape[1:], dtype=torch.bool, device=q.device)
            is_seen_TS = is_seen_TS.tril(len(k) - len(q))
            logits_HTS = logits_HTS.masked_fill(~is_seen_TS, -torch.inf)
        outs.append(torch.einsum("hts,shv->thv", logits_HTS.softmax(-1), v))
    return torch.cat(outs)


def packed_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    packing: Packing,
    *,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Attention output [T, H, V] of packed tokens on CUDA; ``scale`` multiplies the logits.

    Under autocast it runs in its dtype.
    """
    if torch.is_autocast_enabled(q_THK.device.type):
        dtype = torch.get_autocast_dtype(q_THK.device.type)
        q_THK, k_THK, v_THV = q_THK.to(dtype), k_THK.to(dtype), v_THV.to(dtype)
    if is_causal and tiled.fits(q_THK, k_THK, v_THV):
        return tiled_attention(q_THK, k_THK, v_THV, packing, scale=scale, is_causal=is_causal)
    k_SHK, v_SHV = keys_of(k_THK, packing), keys_of(v_THV, packing)
    if q_THK.dtype == torch.float32:
        return efficient_attention(q_THK, k_SHK, v_SHV, packing, scale=scale, is_causal=is_causal)
    return flash_attention(q_THK, k_SHK, v_SHV, packing, scale=scale, is_causal=is_causal)


def tiled_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    packing: Packing,
    *,
    scale: float,
    is_causal: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """Our own kernels: keys of prefixes are read where they lie, values keep their width."""
    return tiled.attend(
        q_THK, k_THK, v_THV, packing.work, scale=scale, is_causal=is_causal, tiles=tiles
    )


def flash_attention(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHV: Tensor,
    packing: Packing,
    *,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """FlashAttention-2 over laid-out keys; values are padded to the width of keys."""
    width = v_SHV.shape[-1]
    v_SHV = functional.pad(v_SHV, (0, k_SHK.shape[-1] - width))
    out_THK: Tensor = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
        q_THK.contiguous(),
        k_SHK.contiguous(),
        v_SHV.contiguous(),
        packing.q_ends,
        packing.k_ends,
        packing.max_q,
        packing.max_k,
        0.0,
        is_causal,
        False,  # noqa: FBT003
        scale=scale,
    )[0]
    return out_THK[..., :width]


def efficient_attention(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHV: Tensor,
    packing: Packing,
    *,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """PyTorch's memory-efficient attention over laid-out keys."""
    out: Tensor = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001
        q_THK[None],
        k_SHK[None],
        v_SHV[None],
        None,
        packing.q_ends,
        packing.k_ends,
        packing.max_q,
        packing.max_k,
        0.0,
        CAUSAL_FROM_THE_END if is_causal else 0,
        True,  # noqa: FBT003
        scale=scale,
    )[0]
    return out[0]


def keys_of(x_THK: Tensor, packing: Packing) -> Tensor:
    """Keys or values [S, H, K] laid out as the sequences attend to them."""
    return x_THK if packing.key_rows is None else x_THK.index_select(0, packing.key_rows)
