"""Kimi K2.5: a decoder of latent attention and experts that reads text and pictures.

    token ids ── embed ─┬─ + media features at the placeholders ─┐
    patches ── MoonViT-3D ── projector ──────────────────────────┘
        ── layers: x += attention(norm(x));  x += feed_forward(norm(x)) ── norm ── lm_head

Everything works on packed tokens: the tokens of all sequences end to end, no batch dimension.
Which tokens see which is decided by the ``AttentionContext`` alone, so training, prefill and
decoding over a cache run the same code.
"""

# Shapes: T = packed tokens, D = hidden, M = media tokens, P = rotary pairs, V = vocabulary,
# X = any number of rows.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.media import MediaBatch
from swarm_sdk.model_backend.model.mla import AttentionContext, LatentAttention
from swarm_sdk.model_backend.model.moe import MixtureOfExperts, SwiGLU
from swarm_sdk.model_backend.model.norm import RMSNorm
from swarm_sdk.model_backend.model.rope import text_rotation
from swarm_sdk.model_backend.model.vision import Projector, VisionTower

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from swarm_sdk.model_backend.model.config import KimiConfig, TextConfig


class DecoderLayer(nn.Module):
    """Attention, then a dense MLP (the first layers) or a mixture of experts."""

    def __init__(self, config: TextConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm: RMSNorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn: LatentAttention = LatentAttention(config, layer_index)
        self.post_attention_layernorm: RMSNorm = RMSNorm(
            config.hidden_size, eps=config.rms_norm_eps
        )
        self.mlp: SwiGLU | MixtureOfExperts = (
            SwiGLU(config.hidden_size, config.intermediate_size)
            if layer_index < config.first_k_dense_replace
            else MixtureOfExperts(config)
        )

    def forward(
        self,
        x_TD: Tensor,
        rotation_TP: Tensor,
        attention: AttentionContext,
        chosen_experts: list[Tensor] | None = None,
        replayed_experts: Iterator[Tensor] | None = None,
    ) -> Tensor:
        """Return the hidden states [T, D] after this layer."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotation_TP, attention)
        normed_TD = self.post_attention_layernorm(x_TD)
        mlp_TD: Tensor = (
            self.mlp(
                normed_TD,
                chosen_experts,
                None if replayed_experts is None else next(replayed_experts),
            )
            if isinstance(self.mlp, MixtureOfExperts)
            else self.mlp(normed_TD)
        )
        return x_TD + mlp_TD


class KimiModel(nn.Module):
    """The whole network. Weights are uninitialised until loaded or ``init_weights`` is called."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.config = config
        text = config.text_config
        self.embed_tokens: nn.Embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers: nn.ModuleList = nn.ModuleList(
            DecoderLayer(text, layer_index) for layer_index in range(text.num_hidden_layers)
        )
        self.norm: RMSNorm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.lm_head: nn.Linear = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.vision_tower: VisionTower = VisionTower(config.vision_config)
        self.mm_projector: Projector = Projector(config.vision_config)

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        attention: AttentionContext,
        media: MediaBatch | Tensor | None = None,
        chosen_experts: list[Tensor] | None = None,
        replayed_experts: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the hidden states [T, D] after the final norm.

        ``positions_T`` count from 0 in each sequence. ``media`` fills the placeholders among
        ``token_ids_T`` in order: items to encode, or features [M, D] from ``encode_media``.
        The ids of the experts that each mixture layer chose, [T, K], are appended to
        ``chosen_experts`` if it is given. ``replayed_experts``, such ids of another pass, are taken
        instead of choosing. Under autocast the residual stream has its dtype, as in an engine whose
        weights have it.

        Raises:
            ConfigError: the number of placeholders differs from that of the media tokens.
        """
        x_TD = self._embed(token_ids_T, media)
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        rotation_TP = text_rotation(positions_T, self.config.text_config)
        replayed = None if replayed_experts is None else iter(replayed_experts)
        for layer in self.layers:
            x_TD = layer(x_TD, rotation_TP, attention, chosen_experts, replayed)
        y_TD: Tensor = self.norm(x_TD)
        return y_TD

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """Return the logits [X, V] in float32 of the token that follows each row."""
        return functional.linear(hidden_XD, self.lm_head.weight).float()

    def encode_media(self, media: MediaBatch) -> Tensor:
        """Return the features [M, D] of the items' tokens, end to end."""
        weight = self.embed_tokens.weight
        patches = torch.tensor(media.patches).to(device=weight.device, dtype=weight.dtype)
        features: Tensor = self.mm_projector(self.vision_tower(patches.flatten(1), media.grids))
        return features

    def _embed(self, token_ids_T: Tensor, media: MediaBatch | Tensor | None) -> Tensor:
        # The placeholder's own row is never read, as in the release: without media it is id 0.
        is_media_T = token_ids_T == self.config.media_placeholder_token_id
        x_TD: Tensor = self.embed_tokens(token_ids_T.masked_fill(is_media_T, 0))
        if media is None:
            return x_TD
        features_MD = self.encode_media(media) if isinstance(media, MediaBatch) else media
        num_placeholders = int(is_media_T.sum())
        if num_placeholders != features_MD.shape[0]:
            raise ConfigError(
                f"the prompt holds {num_placeholders} media placeholders, but its pictures fill "
                f"{features_MD.shape[0]}"
            )
        return x_TD.masked_scatter(is_media_T[:, None], features_MD.to(x_TD.dtype))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw fresh weights: normal with ``initializer_range``, norms one, biases zero."""
        device = self.embed_tokens.weight.device
        generator = torch.Generator(device=device).manual_seed(seed)
        std = self.config.text_config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, buffer in self.named_buffers():
            assert name.endswith("e_score_correction_bias"), name
            buffer.zero_()
