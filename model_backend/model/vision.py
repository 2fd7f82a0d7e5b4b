"""MoonViT-3D and the projector: patches of pictures and clips to token features.

    patches ── linear + positions ── blocks (pre-norm, joint space-time attention) ── norm
            ── pool: mean over frames, 2 x 2 patches side by side ── projector ── features

Items of different sizes are packed end to end (NaViT, arXiv:2307.06304); attention is full inside
an item and absent between items. Positions enter twice: a learned grid, resampled to the item's
size, plus a fixed sinusoid of the frame index (for clips only), and a rotation by column and row
in every block (Kimi K2.5 report, section 4.2).
"""

# Shapes: P = packed patches of all items, D = vision hidden, C = values of a patch (3 * 14 * 14),
# H = heads, K = width of a head, M = packed tokens of all items, X = text hidden.

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarm_sdk.model_backend.kernels.attention import Packing, packed_attention
from swarm_sdk.model_backend.model.rope import rotate, vision_rotation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm_sdk.model_backend.model.config import VisionConfig
    from swarm_sdk.model_backend.model.media import Grid

LAYER_NORM_EPS = 1e-5


class PatchPositions(nn.Module):
    """Learned grid of positions [rows, columns, D], resampled to each item, and frame sinusoids."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_frames: int = config.init_pos_emb_time
        size = (config.init_pos_emb_height, config.init_pos_emb_width, config.vt_hidden_size)
        self.weight: nn.Parameter = nn.Parameter(torch.empty(size))

    def forward(self, grids: Sequence[Grid]) -> Tensor:
        """Return the positions [P, D] of all patches."""
        return torch.cat([self._of_item(grid) for grid in grids])

    def _of_item(self, grid: Grid) -> Tensor:
        num_frames, rows, columns = grid
        table: Tensor = self.weight
        if table.shape[:2] != (rows, columns):
            table = functional.interpolate(
                table.permute(2, 0, 1)[None],
                size=(rows, columns),
                mode="bicubic",
                align_corners=False,
            )[0].permute(1, 2, 0)
        spatial_PD = table.flatten(0, 1)
        if num_frames == 1:  # a picture: no temporal term, unlike the first frame of a clip
            return spatial_PD
        assert num_frames <= self.num_frames, f"a chunk holds at most {self.num_frames} frames"
        temporal_TD = _frame_sinusoids(num_frames, spatial_PD)
        return (spatial_PD + temporal_TD[:, None]).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Linear map of each patch (stored as the convolution it is) plus its position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj: nn.Conv2d = nn.Conv2d(3, config.vt_hidden_size, kernel_size=size, stride=size)
        self.pos_emb: PatchPositions = PatchPositions(config)

    def forward(self, patches_PC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the embedded patches [P, D]."""
        x_PD = functional.linear(patches_PC, self.proj.weight.flatten(1), self.proj.bias)
        positions_PD: Tensor = self.pos_emb(grids)
        return x_PD + positions_PD


class VisionMLP(nn.Module):
    """``fc1(gelu_tanh(fc0(x)))``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc0: nn.Linear = nn.Linear(config.vt_hidden_size, config.vt_intermediate_size)
        self.fc1: nn.Linear = nn.Linear(config.vt_intermediate_size, config.vt_hidden_size)

    def forward(self, x_PD: Tensor) -> Tensor:
        """Return the output [P, D]."""
        y_PD: Tensor = self.fc1(functional.gelu(self.fc0(x_PD), approximate="tanh"))
        return y_PD


class VisionBlock(nn.Module):
    """``x += wo(attention(norm0(x)));  x += mlp(norm1(x))``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.vt_hidden_size
        self.num_heads: int = config.vt_num_attention_heads
        self.norm0: nn.LayerNorm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.norm1: nn.LayerNorm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.wqkv: nn.Linear = nn.Linear(size, 3 * size)
        self.wo: nn.Linear = nn.Linear(size, size)
        self.mlp: VisionMLP = VisionMLP(config)

    def forward(self, x_PD: Tensor, rotation: Tensor, packing: Packing) -> Tensor:
        """Return the patches [P, D]; ``packing`` tells the patches of each item."""
        x_PD = x_PD + self._attention(self.norm0(x_PD), rotation, packing)
        y_PD: Tensor = x_PD + self.mlp(self.norm1(x_PD))
        return y_PD

    def _attention(self, x_PD: Tensor, rotation: Tensor, packing: Packing) -> Tensor:
        q, k, v_PHK = self.wqkv(x_PD).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q_PHK, k_PHK = rotate(q, rotation), rotate(k, rotation)
        if q_PHK.is_cuda:
            scale = q_PHK.shape[-1] ** -0.5
            out_PHK = packed_attention(q_PHK, k_PHK, v_PHK, packing, scale=scale, is_causal=False)
            joined_PD: Tensor = self.wo(out_PHK.flatten(1))
            return joined_PD
        items = zip(*(x.split(packing.lengths) for x in (q_PHK, k_PHK, v_PHK)), strict=True)
        out = [
            functional.scaled_dot_product_attention(
                q_item.transpose(0, 1)[None],
                k_item.transpose(0, 1)[None],
                v_item.transpose(0, 1)[None],
            )[0].transpose(0, 1)
            for q_item, k_item, v_item in items
        ]
        y_PD: Tensor = self.wo(torch.cat(out).flatten(1))
        return y_PD


class VisionEncoder(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = nn.ModuleList(
            VisionBlock(config) for _ in range(config.vt_num_hidden_layers)
        )
        self.final_layernorm: nn.LayerNorm = nn.LayerNorm(config.vt_hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, x_PD: Tensor, rotation: Tensor, packing: Packing) -> Tensor:
        """Return the encoded patches [P, D]."""
        for block in self.blocks:
            x_PD = block(x_PD, rotation, packing)
        y_PD: Tensor = self.final_layernorm(x_PD)
        return y_PD


class VisionTower(nn.Module):
    """MoonViT-3D: packed patches to pooled tokens of 2 x 2 patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed: PatchEmbed = PatchEmbed(config)
        self.encoder: VisionEncoder = VisionEncoder(config)

    def forward(self, patches_PC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return pooled patches [M, 4, D]: one row a token, its 2 x 2 patches row by row."""
        item_lens = [math.prod(grid) for grid in grids]
        assert sum(item_lens) == patches_PC.shape[0], (grids, patches_PC.shape)
        rotation = self._rotation(grids, patches_PC.device)
        packing = Packing(item_lens, patches_PC.device)
        x_PD = self.encoder(self.patch_embed(patches_PC, grids), rotation, packing)
        items = zip(x_PD.split(item_lens), grids, strict=True)
        return torch.cat([self._pool(x_item, grid) for x_item, grid in items])

    def _rotation(self, grids: Sequence[Grid], device: torch.device) -> Tensor:
        places = [
            torch.cartesian_prod(
                torch.arange(rows, device=device), torch.arange(columns, device=device)
            ).repeat(num_frames, 1)
            for num_frames, rows, columns in grids
        ]
        rows_P, columns_P = torch.cat(places).unbind(-1)
        head_dim = self.config.vt_hidden_size // self.config.vt_num_attention_heads
        return vision_rotation(columns_P, rows_P, head_dim)

    def _pool(self, x_PD: Tensor, grid: Grid) -> Tensor:
        num_frames, rows, columns = grid
        tall, wide = self.config.merge_kernel_size
        x = x_PD.view(num_frames, rows // tall, tall, columns // wide, wide, -1)
        return x.mean(dim=0).transpose(1, 2).flatten(0, 1).flatten(1, 2)


class Projector(nn.Module):
    """Norm each patch, join the 2 x 2 patches of a token, two linear maps with GELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.projector_size
        self.pre_norm: nn.LayerNorm = nn.LayerNorm(
            config.vt_hidden_size, eps=config.projector_ln_eps
        )
        self.proj: nn.Sequential = nn.Sequential(
            nn.Linear(size, size), nn.GELU(), nn.Linear(size, config.text_hidden_size)
        )

    def forward(self, x_M4D: Tensor) -> Tensor:
        """Return the features [M, X] of the tokens, as wide as the text model."""
        y_MX: Tensor = self.proj(self.pre_norm(x_M4D).flatten(1))
        return y_MX


def _frame_sinusoids(num_frames: int, like: Tensor) -> Tensor:
    """Return rows ``[sin(t * w) | cos(t * w)]``, ``w = 10000**(-k / (D / 2))``: [frames, D]."""
    half = like.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float32, device=like.device) / half
    frames = torch.arange(num_frames, dtype=torch.float32, device=like.device)
    angles = frames[:, None] * 10000.0 ** (-exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)
