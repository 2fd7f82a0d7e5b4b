"""The network once more, for one token of each of a few sequences on a CPU.

At 1 to 64 rows a step spends its time in starting operations and in reading weights, so this path
walks the weights of a ``KimiModel`` with few operations a layer: norm weights are multiplied into
the matrices behind them, matrices lie transposed, the softmax scale sits in W_UK, rotations come
from a table, keys from ``DecodeRows``. ``KimiModel.forward`` is the truth that it is tested
against; everything else (prompts, CUDA, other dtypes) runs through that.
"""

# Shapes: B = rows, one a sequence, D = hidden, H = heads, N = nope, R = rope, P = R / 2,
# L = latent, W = L + R (one cached token), V = value width, Q = q_lora_rank, E = experts,
# K = experts a token, I = inner width, S = keys of the longest sequence of a band.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

from swarm_sdk.model_backend.kernels.experts import DecodeExperts
from swarm_sdk.model_backend.model.mla import up_projections
from swarm_sdk.model_backend.model.moe import MixtureOfExperts, SwiGLU
from swarm_sdk.model_backend.model.rope import text_rotation

if TYPE_CHECKING:
    from torch import Tensor

    from swarm_sdk.model_backend.engine.rows import Band
    from swarm_sdk.model_backend.model.config import TextConfig
    from swarm_sdk.model_backend.model.kimi import DecoderLayer, KimiModel


@dataclass(frozen=True, slots=True, eq=False)
class _Mlp:
    """A SwiGLU behind a norm, both matrices transposed."""

    gate_up: Tensor
    """[D, 2I]"""
    down: Tensor
    """[I, D]"""

    @staticmethod
    def of(mlp: SwiGLU, norm: Tensor) -> _Mlp:
        return _Mlp(_transposed(mlp.gate_up_proj.weight * norm), _transposed(mlp.down_proj.weight))

    def __call__(self, x_BD: Tensor) -> Tensor:
        gate_BI, up_BI = torch.mm(x_BD, self.gate_up).chunk(2, dim=-1)
        return torch.mm(functional.silu(gate_BI).mul_(up_BI), self.down)


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """Prepared weights of one layer."""

    qkv_a: Tensor
    """[D, Q + W]"""
    q_b: Tensor
    """[Q, H (N + R)], the rotary part times the softmax scale"""
    w_uk: Tensor
    """[H, N, L] times the softmax scale"""
    latent_norm: Tensor
    w_uv: Tensor
    """[H, L, V]"""
    o: Tensor
    """[H V, D]"""
    mlp: _Mlp
    """The dense MLP, or the shared expert."""
    experts: DecodeExperts | None

    @staticmethod
    def of(layer: DecoderLayer) -> _Layer:
        attention, config = layer.self_attn, layer.self_attn.config
        w_uk_HNL, w_uv_HVL = up_projections(attention.kv_b_proj.weight, config)
        q_b = attention.q_b_proj.weight * attention.q_a_layernorm.weight
        q_b = q_b.view(config.num_attention_heads, config.qk_head_dim, -1).clone()
        q_b[:, config.qk_nope_head_dim :] *= config.softmax_scale
        norm = layer.post_attention_layernorm.weight
        mixture = layer.mlp if isinstance(layer.mlp, MixtureOfExperts) else None
        mlp = layer.mlp if isinstance(layer.mlp, SwiGLU) else layer.mlp.shared_experts
        return _Layer(
            qkv_a=_transposed(attention.qkv_a_proj.weight * layer.input_layernorm.weight),
            q_b=_transposed(q_b.flatten(0, 1)),
            w_uk=(w_uk_HNL * config.softmax_scale).contiguous(),
            latent_norm=attention.kv_a_layernorm.weight.clone(),
            w_uv=w_uv_HVL.transpose(1, 2).contiguous(),
            o=_transposed(attention.o_proj.weight),
            mlp=_Mlp.of(mlp, norm),
            experts=_decode_experts(mixture, norm) if mixture else None,
        )


class DecodeNetwork:
    """The prepared weights of a model; made anew when they change."""

    @staticmethod
    def supports(model: KimiModel) -> bool:
        """Whether this path is made for the model: float32 on the CPU."""
        weight = model.embed_tokens.weight
        return weight.device.type == "cpu" and weight.dtype == torch.float32

    @torch.inference_mode()
    def __init__(self, model: KimiModel) -> None:
        config = model.config.text_config
        self.config: TextConfig = config
        self.embedding: Tensor = model.embed_tokens.weight
        self.layers: list[_Layer] = [
            _Layer.of(cast("DecoderLayer", layer)) for layer in model.layers
        ]
        self.lm_head: Tensor = _transposed(model.lm_head.weight * model.norm.weight)
        self.rotation: Tensor = text_rotation(torch.arange(config.max_position_embeddings), config)
        self.eps: Tensor = torch.tensor(config.rms_norm_eps)

    def logits(
        self, ids_B: Tensor, positions_B: Tensor, bands: list[Band], kv_YBW: Tensor
    ) -> Tensor:
        """Return the logits [B, vocabulary]; rows in the order of the bands' sequences.

        Writes the new keys to the bands and to ``kv_YBW``. ``ids_B`` holds no placeholders.
        """
        batch = _Batch(bands, positions_B)
        rotation_BP = self.rotation.index_select(0, positions_B)
        x_BD = self.embedding.index_select(0, ids_B)
        for index, layer in enumerate(self.layers):
            x_BD = x_BD + self._attention(index, layer, x_BD, rotation_BP, batch, kv_YBW[index])
            normed_BD = self._norm(x_BD)
            x_BD = x_BD + layer.mlp(normed_BD)
            if layer.experts is not None:
                x_BD += layer.experts(normed_BD)
        return torch.mm(self._norm(x_BD), self.lm_head)

    def _attention(
        self,
        index: int,
        layer: _Layer,
        x_BD: Tensor,
        rotation_BP: Tensor,
        batch: _Batch,
        kv_BW: Tensor,
    ) -> Tensor:
        config, num_rows = self.config, x_BD.shape[0]
        q_rank, latent = config.q_lora_rank, config.kv_lora_rank
        a = torch.mm(self._norm(x_BD), layer.qkv_a)
        q_BQ, latent_BL, k_rope_BR = a.split_with_sizes(
            [q_rank, latent, config.qk_rope_head_dim], dim=-1
        )
        torch.mul(self._norm(latent_BL), layer.latent_norm, out=kv_BW[:, :latent])
        torch.mul(_pairs(k_rope_BR), rotation_BP, out=_pairs(kv_BW[:, latent:]))

        q = torch.mm(self._norm(q_BQ), layer.q_b).view(num_rows, -1, config.qk_head_dim)
        q_nope_BHN, q_rope_BHR = q.split_with_sizes(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1
        )
        _pairs(q_rope_BHR).mul_(rotation_BP[:, None])
        q_latent_HBL = torch.bmm(q_nope_BHN.transpose(0, 1), layer.w_uk)
        q_BHW = torch.cat([q_latent_HBL.transpose(0, 1), q_rope_BHR], dim=-1)
        out_BHL = batch.attend(index, q_BHW, kv_BW, latent)
        out_HBV = torch.bmm(out_BHL.transpose(0, 1), layer.w_uv)
        return torch.mm(out_HBV.transpose(0, 1).reshape(num_rows, -1), layer.o)

    def _norm(self, x_BX: Tensor) -> Tensor:
        """RMSNorm without its weight: half the time of ``rms_norm`` on a CPU."""
        length_B1 = torch.linalg.vector_norm(x_BX, dim=-1, keepdim=True)
        width = x_BX.shape[-1]
        scale_B1 = torch.addcmul(self.eps, length_B1, length_B1, value=1 / width).rsqrt_()
        return x_BX * scale_B1


class _Batch:
    """Where the rows of one step lie in the bands, the same for all layers."""

    def __init__(self, bands: list[Band], positions_B: Tensor) -> None:
        self.bands = bands
        self.rows: list[slice] = []
        self.places: list[Tensor] = []
        self.biases: list[Tensor] = []
        """[b, 1, S]: 0 at a row's keys, minus infinity behind them."""
        start = 0
        for band in bands:
            rows = slice(start, start + len(band.sequences))
            positions_b = positions_B[rows]
            num_keys = int(positions_b.max()) + 1
            first_b = torch.arange(0, len(positions_b) * band.capacity_tokens, band.capacity_tokens)
            is_padding = torch.arange(num_keys) > positions_b[:, None]
            bias = torch.zeros(is_padding.shape).masked_fill_(is_padding, -torch.inf)
            self.rows.append(rows)
            self.places.append(first_b + positions_b)
            self.biases.append(bias[:, None])
            start = rows.stop

    def attend(self, index: int, q_BHW: Tensor, kv_BW: Tensor, latent: int) -> Tensor:
        """Store the new keys, then return the weighted latents [B, H, L]."""
        parts = []
        for band, rows, place_b, bias in zip(
            self.bands, self.rows, self.places, self.biases, strict=True
        ):
            kv_RCW = band.kv[index]
            kv_RCW.flatten(0, 1).index_copy_(0, place_b, kv_BW[rows])
            keys_bSW = kv_RCW[: bias.shape[0], : bias.shape[2]]
            scores_bHS = torch.baddbmm(bias, q_BHW[rows], keys_bSW.transpose(1, 2))
            parts.append(torch.bmm(scores_bHS.softmax(dim=-1), keys_bSW[..., :latent]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode_experts(mixture: MixtureOfExperts, norm: Tensor) -> DecodeExperts:
    router, experts = mixture.gate, mixture.experts
    return DecodeExperts(
        _transposed(router.weight * norm),
        router.e_score_correction_bias,
        experts.gate_up_proj.detach() * norm,
        experts.down_proj.detach(),
        num_chosen=router.num_chosen,
        scaling_factor=router.routed_scaling_factor,
    )


def _pairs(x: Tensor) -> Tensor:
    """View adjacent channels as complex numbers."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def _transposed(weight: Tensor) -> Tensor:
    return weight.detach().t().contiguous()
