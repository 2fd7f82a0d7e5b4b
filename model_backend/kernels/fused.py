"""Where Triton runs: the memory-bound halves of the hot operations, each in one kernel.

Each function here has a plain one beside the operation that calls it (``logprob.py``,
``experts.py``, ``router.py``), and the two are tested against each other. ``can_run`` says which of
them to take. Triton comes with PyTorch for CUDA and is no dependency of ours.
"""

# Shapes: as in the modules that call; R = rows, C = columns.

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TILES_FROM = (9, 0)
"""Compute capability of the first GPUs that copy whole tiles by themselves."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_run(x: Tensor) -> bool:
    """Whether ``x`` lies where the kernels of this module run."""
    return x.is_cuda and x.dtype in DTYPES and has_triton()


def can_load_tiles(x: Tensor) -> bool:
    """Whether kernels may read ``x`` by ``tiles_of``: from Hopper on."""
    return can_run(x) and torch.cuda.get_device_capability(x.device) >= TILES_FROM


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def kernel(name: str) -> Any:
    """One of ``triton_kernels.py``, to be launched as ``kernel(name)[grid](...)``."""
    return getattr(import_module("swarm_sdk.model_backend.kernels.triton_kernels"), name)


def tiles_of(x: Tensor, block: list[int]) -> Any:
    """What a kernel needs to load ``x`` by tiles of ``block``."""
    return import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor(x, block)


def tile_stats(
    logits_xv: Tensor,
    targets_x: Tensor,
    stats: tuple[Tensor, Tensor, Tensor],
    temperature: float,
) -> None:
    """``logprob.tile_stats``, with the mean logit always."""
    num_rows, num_words = logits_xv.shape
    kernel("tile_stats")[num_rows,](
        logits_xv, targets_x, *stats, num_words, logits_xv.stride(0), 1 / temperature, BLOCK=4096
    )


def tile_gradient(
    logits_xv: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    extra: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> Tensor:
    """``logprob.tile_gradient``, in place."""
    num_rows, num_words = logits_xv.shape
    has_extra = extra is not None
    kernel("tile_gradient")[num_rows,](
        logits_xv,
        *(one.contiguous() for one in columns),
        *(one.contiguous() for one in extra or columns[1:]),
        num_words,
        logits_xv.stride(0),
        1 / temperature,
        HAS_EXTRA=has_extra,
        BLOCK=4096,
    )
    return logits_xv


def swiglu(h_R2I: Tensor, weights_R: Tensor) -> Tensor:
    """``experts.swiglu``: ``silu(gate) * up * weight`` [R, I]."""
    num_rows, inner = h_R2I.shape[0], h_R2I.shape[1] // 2
    a_RI = torch.empty(num_rows, inner, dtype=h_R2I.dtype, device=h_R2I.device)
    if num_rows:
        kernel("swiglu")[num_rows,](h_R2I, weights_R, a_RI, inner, BLOCK=_block(inner))
    return a_RI


def swiglu_backward(
    h_R2I: Tensor, weights_R: Tensor, d_a_RI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``experts.swiglu_backward``: gradients of h and of the weights, and the output again."""
    num_rows, inner = d_a_RI.shape
    d_h_R2I, a_RI = torch.empty_like(h_R2I), torch.empty_like(d_a_RI)
    d_weights_R = torch.empty_like(weights_R)
    if num_rows:
        kernel("swiglu_backward")[num_rows,](
            h_R2I, weights_R, d_a_RI, d_h_R2I, d_weights_R, a_RI, inner, BLOCK=_block(inner)
        )
    return d_h_R2I, d_weights_R, a_RI


def combine(y_RD: Tensor, row_C: Tensor, num_chosen: int) -> Tensor:
    """``experts.combine``: the sum [T, D] of each token's rows, in float32 on the way."""
    num_tokens, width = row_C.shape[0] // num_chosen, y_RD.shape[1]
    y_TD = torch.empty(num_tokens, width, dtype=y_RD.dtype, device=y_RD.device)
    if num_tokens:
        block = min(_block(width), 2048)
        kernel("combine")[num_tokens, -(-width // block)](
            y_RD, row_C, y_TD, width, CHOSEN=num_chosen, BLOCK=block
        )
    return y_TD


def choose(
    logits_TE: Tensor, bias_E: Tensor, num_chosen: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``router.choose``: ids, weights and scores [T, K] of the chosen experts."""
    num_tokens, num_experts = logits_TE.shape
    weights_TK = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=logits_TE.device)
    scores_TK = torch.empty_like(weights_TK)
    ids_TK = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=logits_TE.device)
    if num_tokens:
        kernel("choose")[num_tokens,](
            logits_TE,
            bias_E,
            ids_TK,
            weights_TK,
            scores_TK,
            num_experts,
            scale,
            CHOSEN=num_chosen,
            CHOSEN_BLOCK=_block(num_chosen),
            BLOCK=_block(num_experts),
            num_warps=1 if num_experts <= 1024 else 4,
        )
    return ids_TK, weights_TK, scores_TK


def _block(size: int) -> int:
    return min(1 << max(size - 1, 0).bit_length(), 4096)
