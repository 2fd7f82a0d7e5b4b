"""Attention of packed sequences in one call, on CUDA.

    q   | s0 ... | s1 .. | s2 ....... |            queries of all sequences end to end
    k v | s0 ... | s0 s1 .. | s0 s2 ....... |      keys of each: with a shared prompt, that first

Each sequence's queries are the last of its keys (``is_causal``), or see all of them. The kernels
take the lengths as numbers on the device, so no new shape costs a new plan: PyTorch's own choice
for bfloat16 on Hopper is cuDNN, which plans anew for every length and made steps of many short
sequences 10 times as long. Half precision runs FlashAttention-2 or, if ``IS_TILED``, kernels of
ours (``tiled_attention.py``), float32 the kernel of "memory-efficient" attention; all are
differentiable.
"""

# Shapes: T = packed queries, S = packed keys, H = heads, K = width of a key, V = of a value,
# N = sequences.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from swarm_sdk.model_backend.kernels import tiled_attention as tiled
from swarm_sdk.model_backend.kernels.tiled_attention import Tiles, Work

IS_TILED: bool = False
"""Whether half precision runs our own kernels where they fit, or FlashAttention-2."""
CAUSAL_FROM_THE_END = 2
"""Name of the mask in PyTorch's memory-efficient kernel: the last query sees the last key."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each sequence's queries and keys lie."""

    q_ends: Tensor
    """0 and the ends of the sequences' queries [N + 1], int32."""
    k_ends: Tensor
    """The same of their keys [N + 1]."""
    key_S: Tensor | None
    """Packed token of each key; ``None`` where keys lie as the queries do."""
    max_q: int
    max_k: int
    work: Work
    """What our own kernels go through."""

    @classmethod
    def of(
        cls,
        seq_lens: Sequence[int],
        device: torch.device,
        prefix_of: Sequence[int | None] = (),
    ) -> Packing:
        """Lay out sequences; ``prefix_of`` names the one whose keys stand before a sequence's."""
        ends = [0]
        for length in seq_lens:
            ends.append(ends[-1] + length)
        q_ends = torch.tensor(ends, dtype=torch.int32)
        longest = max(seq_lens)
        work = Work(seq_lens, prefix_of, device)
        if not any(before is not None for before in prefix_of):
            moved = q_ends.to(device, non_blocking=True)
            return cls(moved, moved, None, longest, longest, work)
        pieces: list[np.ndarray] = []
        lengths = [0]
        for index, before in enumerate(prefix_of):
            own = [index] if before is None else [before, index]
            pieces += [np.arange(ends[one], ends[one + 1]) for one in own]
            lengths.append(sum(seq_lens[one] for one in own))
        return cls(
            q_ends.to(device, non_blocking=True),
            torch.from_numpy(np.cumsum(lengths, dtype=np.int32)).to(device, non_blocking=True),
            torch.from_numpy(np.concatenate(pieces)).to(device, non_blocking=True),
            longest,
            max(lengths),
            work,
        )


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
    if IS_TILED and tiled.fits(q_THK, k_THK, v_THV):
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
    return x_THK if packing.key_S is None else x_THK.index_select(0, packing.key_S)
