"""Attention of single rows over latents in pages, on CUDA: one Triton kernel.

    q [T, H, L + R]    row t, heads in blocks of 16 ─┐
    pages of its sequence ─> slots ─> latent | key ──┴─> running softmax, key blocks ─> [T, H, L]

All heads read the same latents (absorbed form), so a block of keys is loaded once for 16 heads, and
keys behind the row's position are never read. In float32 the products are exact float32 sums, not
TF32: what samples must agree with what trains.
"""

# Shapes: T = rows, H = heads, L = latent, R = rope, W = L + R (one cached token), S = keys,
# Q = sequences, P = pages of a sequence.

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_HEADS = 16
"""The least that a tile product takes."""
TILE_BYTES = 32 * 2**10
"""Of a block of latents."""


def is_supported(kv: Tensor, latent: int) -> bool:
    """Whether the kernel is made for a cache [..., W]: on CUDA, widths that are powers of two."""
    rope = kv.shape[-1] - latent
    is_power = all(width >= 16 and width & (width - 1) == 0 for width in (latent, rope))
    # Triton comes with PyTorch for CUDA and is no dependency of ours.
    return kv.is_cuda and is_power and find_spec("triton") is not None


def attend_rows_reference(
    q_THW: Tensor,
    kv_SW: Tensor,
    pages_QP: Tensor,
    sequences_T: Tensor,
    positions_T: Tensor,
    *,
    latent: int,
    page_size: int,
    scale: float,
) -> Tensor:
    """``attend_rows`` in plain operations, over the keys of every row gathered side by side."""
    num_rows, num_keys = len(q_THW), pages_QP.shape[1] * page_size
    offsets = torch.arange(page_size, device=kv_SW.device)
    slots_QS = (pages_QP[..., None] * page_size + offsets).flatten(1)
    keys_TSW = kv_SW[slots_QS[sequences_T].flatten()].view(num_rows, num_keys, -1)
    places_S = torch.arange(num_keys, device=kv_SW.device)
    is_hidden_T1S = (places_S > positions_T[:, None])[:, None]
    logits_THS = torch.bmm(q_THW, keys_TSW.transpose(1, 2))
    logits_THS = logits_THS.to(torch.promote_types(q_THW.dtype, torch.float32)) * scale
    weights_THS = logits_THS.masked_fill(is_hidden_T1S, -torch.inf).softmax(dim=-1)
    return torch.bmm(weights_THS.to(q_THW.dtype), keys_TSW[..., :latent])


def attend_rows(
    q_THW: Tensor,
    kv_SW: Tensor,
    pages_QP: Tensor,
    sequences_T: Tensor,
    positions_T: Tensor,
    *,
    latent: int,
    page_size: int,
    scale: float,
) -> Tensor:
    """Return sums of latents [T, H, L], weighted by the softmax of ``q · key * scale``.

    Row t sees keys 0 to ``positions_T[t]`` of sequence ``sequences_T[t]``, whose token s lies at
    ``pages_QP[sequence, s // page_size] * page_size + s % page_size`` of ``kv_SW``. Integers are
    int64; all is contiguous. Waits for nothing.
    """
    num_rows, num_heads, width = q_THW.shape
    out_THL = torch.empty(num_rows, num_heads, latent, dtype=q_THW.dtype, device=q_THW.device)
    block_keys = max(16, min(64, TILE_BYTES // (latent * kv_SW.element_size())))
    kernels: Any = import_module("swarm_sdk.model_backend.kernels.paged_attention_triton")
    kernels.attend[num_rows, -(-num_heads // BLOCK_HEADS)](
        q_THW,
        kv_SW,
        pages_QP,
        sequences_T,
        positions_T,
        out_THL,
        scale,
        num_heads,
        pages_QP.shape[1],
        LATENT=latent,
        ROPE=width - latent,
        PAGE=page_size,
        HEADS=BLOCK_HEADS,
        KEYS=block_keys,
    )
    return out_THL
