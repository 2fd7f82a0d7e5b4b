"""Attention over the paged cache.

    rows      [ one token of each decoding sequence | chunk of prompt | chunk of prompt | ... ]
    decoding  absorbed form, all sequences at once: heads are queries over the gathered latents
    chunks    one by one, cached prefix + new tokens, in whichever form costs less

Every form scores with ``q · k`` over all keys of a sequence up to the query's own position.
"""

# Shapes: T = rows, B = decoding sequences, C = tokens of one chunk, S = keys (padded for B),
# H = heads, N = nope, R = rope, V = value width, L = latent, W = L + R (one cached token).

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from swarm_sdk.model_backend.model.mla import up_projections

if TYPE_CHECKING:
    from torch import Tensor

    from swarm_sdk.model_backend.model.config import TextConfig


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A chunk of one sequence's prompt."""

    num_tokens: int
    slots: Tensor
    """[S]: places of all its keys up to the chunk's end."""
    is_seen: Tensor | None
    """[C, S]: which keys each token sees; ``None`` for a chunk without a prefix: causal."""


@dataclass(frozen=True, slots=True, eq=False)
class PagedAttention:
    """Where the rows of one step find their keys; an ``AttentionContext``."""

    config: TextConfig
    kv: Tensor
    """[layers, slots, W]"""
    slots: Tensor
    """[T]: the place of each row's own key."""
    decode_slots: Tensor
    """[B, S]: places of the keys of each decoding sequence, any place at padding."""
    decode_bias: Tensor
    """[B, S]: 0 at the keys of the sequence, minus infinity at padding."""
    segments: tuple[Segment, ...]

    def attend(
        self,
        layer_index: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        latent_TL: Tensor,
        k_rope_TR: Tensor,
        kv_b_proj: Tensor,
    ) -> Tensor:
        """Store the rows' keys, then return the attention output [T, H, V]."""
        kv_SW = self.kv[layer_index]
        kv_SW.index_copy_(0, self.slots, torch.cat([latent_TL, k_rope_TR], dim=-1))
        num_decodes, num_keys = self.decode_slots.shape
        parts: list[Tensor] = []
        if num_decodes:
            kv_BSW = kv_SW.index_select(0, self.decode_slots.flatten())
            kv_BSW = kv_BSW.view(num_decodes, num_keys, -1)
            q_nope, q_rope = q_nope_THN[:num_decodes], q_rope_THR[:num_decodes]
            parts.append(self._decode(q_nope, q_rope, kv_BSW, kv_b_proj))
        start = num_decodes
        for segment in self.segments:
            rows = slice(start, start + segment.num_tokens)
            keys_SW = kv_SW.index_select(0, segment.slots)
            form = self._absorbed
            if full_form_is_cheaper(self.config, segment.num_tokens, keys_SW.shape[0]):
                form = self._full
            parts.append(
                form(q_nope_THN[rows], q_rope_THR[rows], keys_SW, kv_b_proj, segment.is_seen)
            )
            start = rows.stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self, q_nope_BHN: Tensor, q_rope_BHR: Tensor, kv_BSW: Tensor, kv_b_proj: Tensor
    ) -> Tensor:
        w_uk_HNL, w_uv_HVL = up_projections(kv_b_proj, self.config)
        q_latent_BHL = torch.bmm(q_nope_BHN.transpose(0, 1), w_uk_HNL).transpose(0, 1)
        q_BHW = torch.cat([q_latent_BHL, q_rope_BHR], dim=-1)
        out_BHW = functional.scaled_dot_product_attention(
            q_BHW[:, None],
            kv_BSW[:, None],
            kv_BSW[:, None],
            attn_mask=self.decode_bias[:, None, None],
            scale=self.config.softmax_scale,
        )[:, 0]
        out_HBL = out_BHW[..., : self.config.kv_lora_rank].transpose(0, 1)
        return torch.bmm(out_HBL, w_uv_HVL.transpose(1, 2)).transpose(0, 1)

    def _absorbed(
        self,
        q_nope_CHN: Tensor,
        q_rope_CHR: Tensor,
        keys_SW: Tensor,
        kv_b_proj: Tensor,
        is_seen_CS: Tensor | None,
    ) -> Tensor:
        w_uk_HNL, w_uv_HVL = up_projections(kv_b_proj, self.config)
        q_latent_HCL = torch.bmm(q_nope_CHN.transpose(0, 1), w_uk_HNL)
        q_HCW = torch.cat([q_latent_HCL, q_rope_CHR.transpose(0, 1)], dim=-1)
        keys_HSW = keys_SW.expand(self.config.num_attention_heads, -1, -1)
        out_HCW = self._softmax(q_HCW, keys_HSW, keys_HSW, is_seen_CS)
        out_HCL = out_HCW[..., : self.config.kv_lora_rank]
        return torch.bmm(out_HCL, w_uv_HVL.transpose(1, 2)).transpose(0, 1)

    def _full(
        self,
        q_nope_CHN: Tensor,
        q_rope_CHR: Tensor,
        keys_SW: Tensor,
        kv_b_proj: Tensor,
        is_seen_CS: Tensor | None,
    ) -> Tensor:
        config, num_heads = self.config, self.config.num_attention_heads
        latent_SL, k_rope_SR = keys_SW.split_with_sizes(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        kv = functional.linear(latent_SL, kv_b_proj).view(keys_SW.shape[0], num_heads, -1)
        k_nope_SHN, v_SHV = kv.split_with_sizes(
            [config.qk_nope_head_dim, config.v_head_dim], dim=-1
        )
        q = torch.cat([q_nope_CHN, q_rope_CHR], dim=-1)
        k = torch.cat([k_nope_SHN, k_rope_SR[:, None].expand(-1, num_heads, -1)], dim=-1)
        # Fused kernels want values as wide as keys (see FullAttention).
        v = functional.pad(v_SHV, (0, config.qk_head_dim - config.v_head_dim))
        out_HCK = self._softmax(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_seen_CS)
        return out_HCK.transpose(0, 1)[..., : config.v_head_dim]

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, is_seen_CS: Tensor | None) -> Tensor:
        return functional.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=is_seen_CS,
            is_causal=is_seen_CS is None,
            scale=self.config.softmax_scale,
        )[0]


def full_form_is_cheaper(config: TextConfig, num_queries: int, num_keys: int) -> bool:
    """Compare the multiplications a head of both forms for one chunk.

    full      keys expanded (S L (N + V)), then scores and sums over 2 (N + R) channels
    absorbed  queries and outputs mapped (C L (N + V)), then over 2 (L + R) channels
    """
    maps = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    pairs = 2 * num_queries * num_keys
    full = num_keys * maps + pairs * config.qk_head_dim
    absorbed = num_queries * maps + pairs * (config.kv_lora_rank + config.qk_rope_head_dim)
    return full <= absorbed
