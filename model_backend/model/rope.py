"""Rotary positions, written as complex numbers: a pair of channels turns by position x frequency.

    (x0 + i x1) -> (x0 + i x1) * exp(i * position * frequency)

Channels rotate in adjacent pairs (0, 1), (2, 3) … (DeepSeek's interleaved layout). The text model
stretches its frequencies with YaRN (arXiv:2309.00071); MoonViT-3D turns even pairs by the patch's
column and odd pairs by its row.
"""

# Shapes: T = tokens or patches, H = heads, R = rotary channels of a head, P = R / 2 pairs.

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from swarm_sdk.model_backend.model.config import TextConfig

VISION_ROPE_THETA = 10000.0


def text_rotation(positions_T: Tensor, config: TextConfig) -> Tensor:
    """Return the rotations of the text positions as complex64 [T, P], shared by all layers."""
    frequencies_P = _yarn_frequencies(config, positions_T.device)
    angles_TP = positions_T.to(torch.float32)[:, None] * frequencies_P
    rotation_TP = torch.polar(torch.ones_like(angles_TP), angles_TP)
    yarn = config.rope_scaling
    magnitude = yarn.scale(yarn.mscale) / yarn.scale(yarn.mscale_all_dim)
    return rotation_TP if magnitude == 1.0 else rotation_TP * magnitude


def vision_rotation(columns_T: Tensor, rows_T: Tensor, head_dim: int) -> Tensor:
    """Return the rotations of patches at (column, row) as complex64 [T, head_dim / 2].

    Pair 2i turns by ``column * theta**(-4i / head_dim)``, pair 2i + 1 by the row alike.
    """
    exponents = torch.arange(0, head_dim, 4, dtype=torch.float32, device=columns_T.device)
    frequencies = VISION_ROPE_THETA ** (-exponents / head_dim)
    coordinates_T12 = torch.stack([columns_T, rows_T], dim=-1).to(torch.float32)[:, None, :]
    angles_TP = (coordinates_T12 * frequencies[:, None]).flatten(1)
    return torch.polar(torch.ones_like(angles_TP), angles_TP)


def rotate(x_THR: Tensor, rotation_TP: Tensor) -> Tensor:
    """Turn every pair of channels of every head; computed in float32, dtype kept."""
    num_tokens, num_heads, num_channels = x_THR.shape
    pairs = x_THR.float().view(num_tokens, num_heads, num_channels // 2, 2)
    x_THP = torch.view_as_complex(pairs)
    turned_THR = torch.view_as_real(x_THP * rotation_TP[:, None]).flatten(-2)
    return turned_THR.to(x_THR.dtype)


@functools.lru_cache(maxsize=16)
def _yarn_frequencies(config: TextConfig, device: torch.device) -> Tensor:
    """Return the radians per position of each pair [P].

    Pairs that turn more than ``beta_fast`` times within the original length keep their frequency,
    those that turn less than ``beta_slow`` times are slowed by ``factor``, with a ramp between.
    """
    yarn, dim, theta = config.rope_scaling, config.qk_rope_head_dim, config.rope_theta

    def pair_that_turns(num_turns: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    pairs_P = torch.arange(dim // 2, dtype=torch.float32, device=device)
    frequencies_P = theta ** (-2 * pairs_P / dim)
    slowed_P = ((pairs_P - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies_P * (1 - slowed_P) + frequencies_P / yarn.factor * slowed_P
