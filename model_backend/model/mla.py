"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Each token leaves one latent vector and one rotary key for all heads; that is all a cache holds:

    x ── q_a ── norm ── q_b ──────────────> q_nope_THN, q_rope_THR
    x ── kv_a ─┬─ norm ───────────────────> latent_TL       ┐ the cache:
               └─ rotate ─────────────────> k_rope_TR       ┘ L + R numbers a token and layer
    [W_UK; W_UV] = kv_b_proj                k_nope = latent W_UK^T,  v = latent W_UV^T

Two forms give the same output. The *full* form expands keys and values and runs ordinary
attention: prefill and training. The *absorbed* form moves W_UK to the query and W_UV behind the
softmax, so that heads attend to the latent itself: decoding over a cache.

    q_nope · (W_UK latent)  =  (W_UK^T q_nope) · latent

The layer computes projections and rotations; where keys of earlier tokens come from is the
``AttentionContext``'s business (packed segments here, a paged cache in the engine).
"""

# Shapes: T = packed tokens, S = keys of one sequence, D = hidden, H = heads, N = nope, R = rope,
# V = value width, L = latent (kv_lora_rank), Q = q_lora_rank; in FullAttention N = segments.

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from swarm_sdk.model_backend.kernels.attention import Packing, packed_attention
from swarm_sdk.model_backend.model.norm import RMSNorm
from swarm_sdk.model_backend.model.rope import rotate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm_sdk.model_backend.model.config import TextConfig


class AttentionContext(Protocol):
    """What the tokens of one forward pass attend to."""

    def attend(
        self,
        layer_index: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        latent_TL: Tensor,
        k_rope_TR: Tensor,
        kv_b_proj: Tensor,
    ) -> Tensor:
        """Return the attention output [T, H, V] of one layer.

        The rotary parts are already rotated, ``latent_TL`` is already normalised, and
        ``kv_b_proj`` is [H * (N + V), L]. The softmax scale is ``TextConfig.softmax_scale``.
        """
        ...


class FullAttention:
    """Causal attention inside each of the packed segments, by the full form.

    ``prefix_of``, if given, names for each segment the earlier one whose tokens stand before its
    own, or ``None``: responses to one prompt then share the work on it. ``max_logits_YH`` [layers,
    H] float32, if given, is raised to each head's largest softmax input, for QK-Clip (Kimi K2
    report, section 2.1). That costs as much as half of attention, so heads are passed over whose
    longest query times longest key cannot exceed ``logit_floor``.
    """

    def __init__(
        self,
        config: TextConfig,
        seq_lens: Sequence[int],
        *,
        prefix_of: Sequence[int | None] | None = None,
        max_logits_YH: Tensor | None = None,
        logit_floor: float = -torch.inf,
    ) -> None:
        self.config = config
        self.logit_floor = logit_floor
        self.seq_lens: tuple[int, ...] = tuple(seq_lens)
        self.prefix_of: tuple[int | None, ...] = tuple(prefix_of or [None] * len(self.seq_lens))
        self.max_logits_YH: Tensor | None = max_logits_YH
        self._packing: Packing | None = None
        self._segment_T: Tensor | None = None

    def attend(
        self,
        layer_index: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        latent_TL: Tensor,
        k_rope_TR: Tensor,
        kv_b_proj: Tensor,
    ) -> Tensor:
        """Return the attention output [T, H, V]; one call on CUDA or for equal segments."""
        config, num_tokens = self.config, latent_TL.shape[0]
        assert sum(self.seq_lens) == num_tokens, (self.seq_lens, num_tokens)
        kv = functional.linear(latent_TL, kv_b_proj).view(
            num_tokens, config.num_attention_heads, -1
        )
        k_nope_THN, v_THV = kv.split_with_sizes(
            [config.qk_nope_head_dim, config.v_head_dim], dim=-1
        )
        q = torch.cat([q_nope_THN, q_rope_THR], dim=-1)
        k = torch.cat([k_nope_THN, k_rope_TR[:, None].expand_as(q_rope_THR)], dim=-1)
        if self.max_logits_YH is not None:
            self._watch(self.max_logits_YH[layer_index], q.detach(), k.detach())
        if q.is_cuda:
            if self._packing is None:
                self._packing = Packing(self.seq_lens, q.device, self.prefix_of)
            return packed_attention(
                q, k, v_THV, self._packing, scale=config.softmax_scale, is_causal=True
            )
        # Fused attention kernels want values as wide as keys; without them a CPU takes 3 times as
        # long and holds the full matrix of logits.
        v = functional.pad(v_THV, (0, config.qk_head_dim - config.v_head_dim))
        if len(set(self.seq_lens)) == 1 and not any(p is not None for p in self.prefix_of):
            batch = (len(self.seq_lens), self.seq_lens[0])
            out = self._causal(*(x.view(*batch, *x.shape[1:]) for x in (q, k, v))).flatten(0, 1)
            return out[..., : config.v_head_dim]
        qs, ks, vs = (x.split_with_sizes(self.seq_lens) for x in (q, k, v))
        outs: list[Tensor] = []
        for index, before in enumerate(self.prefix_of):
            k_SHK, v_SHK = ks[index], vs[index]
            if before is not None:
                k_SHK = torch.cat([ks[before], k_SHK])
                v_SHK = torch.cat([vs[before], v_SHK])
            outs.append(self._causal(qs[index][None], k_SHK[None], v_SHK[None])[0])
        return torch.cat(outs)[..., : config.v_head_dim]

    def _watch(self, max_H: Tensor, q_THK: Tensor, k_THK: Tensor) -> None:
        """Raise ``max_H`` to the largest logits of the heads that may pass the floor."""
        scale = self.config.softmax_scale
        q_TH, k_TH = _lengths(q_THK), _lengths(k_THK)
        if not bool((q_TH.amax(dim=0) * k_TH.amax(dim=0) * scale > self.logit_floor).any()):
            return
        may_pass = self._longest(q_TH) * self._longest(k_TH, with_prefix=True) * scale
        heads_of: dict[int, list[int]] = {}
        for index, head in (may_pass > self.logit_floor).nonzero().tolist():
            heads_of.setdefault(index, []).append(head)
        qs, ks = (x.split_with_sizes(self.seq_lens) for x in (q_THK, k_THK))
        for index, heads in heads_of.items():
            before, k_SHK = self.prefix_of[index], ks[index][:, heads]
            if before is not None:
                k_SHK = torch.cat([ks[before][:, heads], k_SHK])
            found = max_causal_logits(qs[index][:, heads], k_SHK, scale)
            max_H[heads] = torch.maximum(max_H[heads], found)

    def _longest(self, lengths_TH: Tensor, *, with_prefix: bool = False) -> Tensor:
        """The largest length [segments, H] of each segment, its prefix included."""
        if self._segment_T is None:
            segments = np.repeat(np.arange(len(self.seq_lens)), self.seq_lens)
            self._segment_T = torch.from_numpy(segments).to(lengths_TH.device)
        longest_NH: Tensor = lengths_TH.new_zeros(len(self.seq_lens), lengths_TH.shape[1])
        places_TH = self._segment_T[:, None].expand_as(lengths_TH)
        longest_NH = longest_NH.scatter_reduce(0, places_TH, lengths_TH, "amax")
        if with_prefix and any(p is not None for p in self.prefix_of):
            first = [i if p is None else p for i, p in enumerate(self.prefix_of)]
            longest_NH = torch.maximum(longest_NH, longest_NH[first])
        return longest_NH

    def _causal(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
        """Attention of T queries that are the last T of S tokens."""
        num_queries, num_keys = q_BTHK.shape[1], k_BSHK.shape[1]
        is_seen_TS = None
        if num_queries < num_keys:
            is_seen_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BTHK.device)
            is_seen_TS = is_seen_TS.tril(diagonal=num_keys - num_queries)
        out_BHTK = functional.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BSHK.transpose(1, 2),
            v_BSHK.transpose(1, 2),
            attn_mask=is_seen_TS,
            is_causal=is_seen_TS is None,
            scale=self.config.softmax_scale,
        )
        return out_BHTK.transpose(1, 2)


def _lengths(x_THK: Tensor) -> Tensor:
    """Length [T, H], float32, of each vector."""
    wide = torch.promote_types(x_THK.dtype, torch.float32)
    lengths_TH: Tensor = torch.linalg.vector_norm(x_THK, dim=-1, dtype=wide).float()
    return lengths_TH


def max_causal_logits(
    q_THK: Tensor, k_SHK: Tensor, scale: float, *, chunk_tokens: int = 512
) -> Tensor:
    """Return the largest softmax input [H], float32, over all pairs that causal attention sees.

    The T queries are the last T of the S tokens.
    """
    num_before = k_SHK.shape[0] - q_THK.shape[0]
    max_H = torch.full((q_THK.shape[1],), -torch.inf, device=q_THK.device)
    for start in range(0, q_THK.shape[0], chunk_tokens):
        q_CHK = q_THK[start : start + chunk_tokens]
        first = num_before + start
        logits_HCS = torch.einsum("chk,shk->hcs", q_CHK, k_SHK[: first + q_CHK.shape[0]]).float()
        is_hidden_CS = torch.ones(logits_HCS.shape[1:], dtype=torch.bool, device=q_THK.device)
        logits_HCS = logits_HCS.masked_fill(is_hidden_CS.triu(diagonal=first + 1), -torch.inf)
        max_H = torch.maximum(max_H, logits_HCS.amax(dim=(1, 2)))
    return max_H * scale


def up_projections(kv_b_proj: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """Return ``kv_b_proj`` [H * (N + V), L] as views W_UK [H, N, L] and W_UV [H, V, L]."""
    per_head = kv_b_proj.view(config.num_attention_heads, -1, config.kv_lora_rank)
    w_uk_HNL, w_uv_HVL = per_head.split_with_sizes(
        [config.qk_nope_head_dim, config.v_head_dim], dim=1
    )
    return w_uk_HNL, w_uv_HVL


def absorb(
    q_nope_THN: Tensor,
    q_rope_THR: Tensor,
    latent_SL: Tensor,
    k_rope_SR: Tensor,
    kv_b_proj: Tensor,
    *,
    config: TextConfig,
) -> Tensor:
    """Return the attention output [T, H, V] of one sequence by the absorbed form.

    The T queries are the last T of the S tokens; each sees the tokens up to itself. Readable
    reference for caches and kernels, which gather ``latent_SL`` and ``k_rope_SR`` themselves.
    """
    w_uk_HNL, w_uv_HVL = up_projections(kv_b_proj, config)
    q_latent_THL = torch.einsum("thn,hnl->thl", q_nope_THN, w_uk_HNL)
    logits_HTS = torch.einsum("thl,sl->hts", q_latent_THL, latent_SL)
    logits_HTS = logits_HTS + torch.einsum("thr,sr->hts", q_rope_THR, k_rope_SR)
    num_queries, num_keys = logits_HTS.shape[-2:]
    is_seen_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=logits_HTS.device)
    is_seen_TS = is_seen_TS.tril(diagonal=num_keys - num_queries)
    logits_HTS = (logits_HTS.float() * config.softmax_scale).masked_fill(~is_seen_TS, -torch.inf)
    weights_HTS = logits_HTS.softmax(dim=-1).to(latent_SL.dtype)
    out_latent_THL = torch.einsum("hts,sl->thl", weights_HTS, latent_SL)
    return torch.einsum("thl,hvl->thv", out_latent_THL, w_uv_HVL)


class LatentAttention(nn.Module):
    """One attention layer; ``qkv_a_proj`` is q_a_proj above kv_a_proj_with_mqa, one matrix."""

    def __init__(self, config: TextConfig, layer_index: int) -> None:
        super().__init__()
        self.config: TextConfig = config
        self.layer_index: int = layer_index
        heads, q_rank, kv_rank = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
        self.a_sizes: list[int] = [q_rank, kv_rank, config.qk_rope_head_dim]
        self.qkv_a_proj: nn.Linear = nn.Linear(config.hidden_size, sum(self.a_sizes), bias=False)
        self.q_a_layernorm: RMSNorm = RMSNorm(q_rank, eps=config.rms_norm_eps)
        self.q_b_proj: nn.Linear = nn.Linear(q_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_layernorm: RMSNorm = RMSNorm(kv_rank, eps=config.rms_norm_eps)
        kv_dim = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj: nn.Linear = nn.Linear(kv_rank, heads * kv_dim, bias=False)
        self.o_proj: nn.Linear = nn.Linear(
            heads * config.v_head_dim, config.hidden_size, bias=False
        )

    def forward(self, x_TD: Tensor, rotation_TP: Tensor, attention: AttentionContext) -> Tensor:
        """Return the attention output [T, D], before the residual sum."""
        config = self.config
        q_TQ, latent_TL, k_rope_TR = self.qkv_a_proj(x_TD).split_with_sizes(self.a_sizes, dim=-1)
        q: Tensor = self.q_b_proj(self.q_a_layernorm(q_TQ))
        q = q.view(-1, config.num_attention_heads, config.qk_head_dim)
        q_nope_THN, q_rope_THR = q.split_with_sizes(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1
        )
        out_THV = attention.attend(
            self.layer_index,
            q_nope_THN,
            rotate(q_rope_THR, rotation_TP),
            self.kv_a_layernorm(latent_TL),
            rotate(k_rope_TR[:, None], rotation_TP)[:, 0],
            self.kv_b_proj.weight,
        )
        out_TD: Tensor = self.o_proj(out_THV.flatten(1))
        return out_TD
