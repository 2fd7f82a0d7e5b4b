"""One update of the policy: packed batches -> log-probs -> eq. (1) -> MuonClip.

    micro-batch ─ forward ─> log p_theta of the trained ids ─┬─> minus eq. (1) ─> backward
                    │                                        └─> |Δ| to what the engine recorded
                    └─ largest logits of each head ───────────────────────> QK-Clip, after the step

The forward is the engine's own network in its full form, so that trainer and engine agree; how
well they do is measured with every update on tokens whose weights the trainer still holds.
"""

# Shapes: T = packed tokens, X = trained tokens, V = vocabulary, D = hidden, Y = layers, H = heads,
# K = experts a token.

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.kernels.logprob import linear_logprobs
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.media import MediaBatch, decode_image, preprocess_image
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.traces.parl.batch import Batch, MicroBatch, empty_batch, micro_batches
from swarm_sdk.traces.parl.distributed import ALONE, Team, shard
from swarm_sdk.traces.parl.loss import LossConfig, policy_loss
from swarm_sdk.traces.parl.muonclip import MuonClip, MuonClipConfig, clip_grad_norm, qk_clip

ROUTING_TOKENS = 2_048


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """Ours, by trial, but for the constants of MuonClip."""

    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: MuonClipConfig = field(default_factory=MuonClipConfig)
    warmup_updates: int = 0
    """Updates over which the rate rises linearly."""
    max_grad_norm: float = 1.0
    micro_tokens: int = 16_384
    """Packed tokens of one forward pass."""
    autocast: bool = False
    """Compute in bfloat16 over the float32 weights, as an engine in bfloat16 does."""


@dataclass(slots=True)
class Agreement:
    """How far the trainer's log-probabilities are from those that the sampler recorded."""

    num_tokens: int = 0
    sum_abs: float = 0.0
    max_abs: float = 0.0

    def add(self, difference_X: Tensor) -> None:
        """Count tokens whose weights are the trainer's own."""
        if len(difference_X):
            self.num_tokens += len(difference_X)
            self.sum_abs += float(difference_X.sum())
            self.max_abs = max(self.max_abs, float(difference_X.max()))


class Learner:
    """The policy's float32 weights and their optimiser.

    Pictures are seen and not learned: the vision tower and the projector stay as they are, as in
    the report's zero-vision stage.
    """

    def __init__(self, model: KimiModel, config: LearnerConfig, team: Team = ALONE) -> None:
        """Take over ``model``, sharded over the ``team`` from here on."""
        for name, parameter in model.named_parameters():
            is_vision = name.startswith(("vision_tower", "mm_projector"))
            parameter.requires_grad_(not is_vision)
        shard(model, team)
        self.team: Team = team
        self.model: KimiModel = model.train()
        self.config: LearnerConfig = config
        self.optimizer: MuonClip = MuonClip(model, config.optimizer)
        self.num_updates: int = 0
        text = model.config.text_config
        self._max_logits_shape = (text.num_hidden_layers, text.num_attention_heads)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.embed_tokens.weight.device

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, as ``EmbeddedEngine.update_weights`` takes them; no copy."""
        return {
            name: _whole(parameter.detach())
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def logprobs(
        self,
        micro: MicroBatch,
        *,
        max_logits_YH: Tensor | None = None,
        chosen_experts: list[Tensor] | None = None,
        replayed_experts: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Log p_theta [X], float32, of the trained ids at the temperature that sampled them."""
        attention = FullAttention(
            self.model.config.text_config,
            micro.seq_lens,
            prefix_of=micro.prefix_of,
            max_logits_YH=max_logits_YH,
            logit_floor=self.config.optimizer.tau,
        )
        hidden_TD = self.model(
            micro.ids_T,
            micro.positions_T,
            attention,
            self._media(micro),
            chosen_experts,
            replayed_experts,
        )
        hidden_XD = hidden_TD.index_select(0, micro.rows_X)
        found = linear_logprobs(
            hidden_XD,
            self.model.lm_head.weight,
            micro.targets_X,
            temperature=micro.temperature,
        )
        return found.logprobs_X

    def accumulate(
        self,
        batch: Batch,
        *,
        version: int | None = None,
        num_questions: int | None = None,
        replayed: KimiModel | None = None,
    ) -> tuple[dict[str, float], Tensor]:
        """Add the batch's gradient of minus eq. (1) to what is there; returns figures and logits.

        Args:
            batch: whole groups.
            version: tokens of this policy version are compared with the engine's record.
            num_questions: over how many eq. (1) takes its mean, where the batch is a part.
            replayed: the network that sampled, whose choice of experts is taken (routing replay)
                where the batch has none on record.

        Raises:
            ConfigError: experts on record are of another model.
        """
        device, team = self.device, self.team
        max_logits_YH = torch.full(self._max_logits_shape, -torch.inf, device=device)
        sums = torch.zeros(5, device=device)
        agreement = Agreement()
        num_questions = num_questions or len(batch.groups)
        own = Batch(groups=team.part([group for group in batch.groups if group]))
        packed_batches = micro_batches(own, self.config.micro_tokens, num_questions=num_questions)
        num_passes = int(team.max(torch.tensor(len(packed_batches), device=device)))
        packed_batches += [empty_batch()] * (num_passes - len(packed_batches))
        for packed in packed_batches:
            micro = packed.to(device)
            experts = self._recorded(micro)
            if experts is None and replayed is not None:
                experts = self._chosen(replayed, micro)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast):
                logprobs_X = self.logprobs(
                    micro, max_logits_YH=max_logits_YH, replayed_experts=experts
                )
            parts = policy_loss(
                logprobs_X,
                micro.sampled_logprobs_X,
                micro.advantages_X,
                micro.weights_X,
                self.config.loss,
            )
            parts.loss.backward()  # type: ignore[no-untyped-call]
            is_real = float(micro.weights_X.sum() > 0)
            num_packed = torch.tensor(float(len(micro.ids_T)), device=device)
            counts = torch.stack([parts.num_tokens, parts.num_masked, parts.kl, num_packed])
            sums += torch.cat([parts.loss.detach()[None], is_real * counts])
            if version is not None:
                difference_X = (logprobs_X.detach() - micro.sampled_logprobs_X).abs()
                agreement.add(difference_X[micro.versions_X == version])
        team.max(max_logits_YH)
        loss, num_tokens, num_masked, kl, num_packed = team.sum(sums).tolist()
        figures = {
            "loss": loss,
            "loss_tokens": num_tokens,
            "packed_tokens": num_packed,
            "share_masked": num_masked / max(num_tokens, 1.0),
            "kl": kl / max(num_tokens, 1.0),
        }
        if agreement.num_tokens:
            figures["engine_trainer_mean_abs_dlogprob"] = agreement.sum_abs / agreement.num_tokens
            figures["engine_trainer_max_abs_dlogprob"] = agreement.max_abs
        return figures, max_logits_YH

    @torch.no_grad()
    def routing_disagreement(self, served: KimiModel, batch: Batch) -> float | None:
        """Share of (token, mixture layer) for which the engine's network chooses other experts.

        ``served`` is the network that sampled, in its own dtype, with the weights that this learner
        still has; measured on one pass of about ``ROUTING_TOKENS`` tokens. ``None`` without any.
        """
        groups = [group[:1] for group in batch.groups if group]
        if not groups:
            return None
        micro = micro_batches(Batch(groups=groups), ROUTING_TOKENS)[0].to(self.device)
        ours: list[Tensor] = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            self.logprobs(micro, chosen_experts=ours)
        theirs = self._chosen(served, micro)
        differs = [
            (one.sort(-1).values != other.sort(-1).values).any(-1).float().mean()
            for one, other in zip(ours, theirs, strict=True)
        ]
        return float(torch.stack(differs).mean()) if differs else None

    def update(
        self,
        batch: Batch,
        *,
        version: int | None = None,
        num_questions: int | None = None,
        replayed: KimiModel | None = None,
    ) -> dict[str, float]:
        """One optimiser step; returns its figures. Nothing changes where nothing trains.

        The arguments are those of ``accumulate``.
        """
        started_s = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        figures, max_logits_YH = self.accumulate(
            batch, version=version, num_questions=num_questions, replayed=replayed
        )
        return self.apply(figures, max_logits_YH, started_s)

    def apply(
        self, figures: dict[str, float], max_logits_YH: Tensor, started_s: float
    ) -> dict[str, float]:
        """Step on the gradients that were accumulated."""
        config = self.config
        trained = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        if trained:
            share = (self.num_updates + 1) / max(config.warmup_updates, 1)
            for group in self.optimizer.param_groups:
                group["lr"] = config.optimizer.lr * min(1.0, share)
            figures["grad_norm"] = clip_grad_norm(trained, config.max_grad_norm)
            self.optimizer.step()
            num_clipped = qk_clip(self.model, max_logits_YH, config.optimizer.tau)
            figures["clipped_heads"] = float(num_clipped)
            self.num_updates += 1
        figures["update_s"] = time.perf_counter() - started_s
        return figures

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: weights and, by the names of theirs, the optimiser's moments.

        Tensors only, the learner's own: ``torch.distributed.checkpoint`` loads into them.
        """
        moments = {
            name: dict(self.optimizer.state[parameter])
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        return {"model": self.model.state_dict(), "optimizer": moments}

    def _recorded(self, micro: MicroBatch) -> Sequence[Tensor] | None:
        """The experts [T, K] on record, of each mixture layer."""
        if micro.experts_TLK is None:
            return None
        text = self.model.config.text_config
        shape = (text.num_hidden_layers, text.num_experts_per_tok)
        if micro.experts_TLK.shape[1:] != shape:
            raise ConfigError(
                f"the experts on record are of {tuple(micro.experts_TLK.shape[1:])} layers and "
                f"choices, and the policy has {shape}: another model sampled; leave "
                "replay_routing off"
            )
        return micro.experts_TLK[:, text.first_k_dense_replace :].unbind(1)

    @torch.no_grad()
    def _chosen(self, served: KimiModel, micro: MicroBatch) -> list[Tensor]:
        """The experts [T, K] that another network chooses, of each mixture layer."""
        chosen: list[Tensor] = []
        attention = FullAttention(
            served.config.text_config, micro.seq_lens, prefix_of=micro.prefix_of
        )
        served(micro.ids_T, micro.positions_T, attention, self._media(micro), chosen)
        return chosen

    def _media(self, micro: MicroBatch) -> MediaBatch | None:
        """The pictures, where the policy sees them: without vision it is told their names only."""
        is_media_T = micro.ids_T == self.model.config.media_placeholder_token_id
        if not micro.images or not bool(is_media_T.any()):
            return None
        return MediaBatch.of([preprocess_image(decode_image(i.data)) for i in micro.images])


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def mean_figures(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One figure a key over several updates: sums of seconds and tokens, means of the rest."""
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for one in figures for key in one):
        values = [one[key] for one in figures if key in one]
        is_sum = key.endswith(("_s", "_tokens", "_heads"))
        is_max = "max" in key
        found[key] = max(values) if is_max else sum(values) / (1 if is_sum else len(values))
    return found
