"""Supervised training on recorded episodes: the ledger's ids in, a better policy out.

    rows (ids, is_sampled) -> pool -> batches of like lengths -> loss -> AdamW

    loss = sum_t w_t * -log p(id_t | ids before t) / sum_t w_t
    w = 1 on sampled ids, else context_weight

Rows are padded to the longest of their batch, on the right, where causal attention never looks.
Experts are kept in balance without a loss term, as in the K2.5 router: after each step the
selection bias of every expert moves by ``bias_rate`` towards the mean load.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.model_backend.model.moe import MixtureOfExperts

# Shapes: B = rows of a batch, S = length of its longest row, T = B*S packed, V = vocabulary.

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One agent's context: what it saw and said."""

    ids: np.ndarray
    """uint16 or int32, shape [S]."""
    is_sampled: np.ndarray
    """bool, shape [S]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Ours, by trial: the report gives no hyper-parameters of supervised training."""

    max_steps: int = 1_000_000
    max_seconds: float = math.inf
    """Training stops at whichever comes first; the learning rate reaches 0 there."""
    batch_tokens: int = 65_536
    peak_lr: float = 3e-3
    warmup_share: float = 0.02
    context_weight: float = 0.1
    """Loss weight of ids that were not sampled; they teach copying and the documents' language."""
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    bias_rate: float = 1e-3
    pool_rows: int = 2_048
    """Rows sorted by length together; larger pads less and mixes less."""
    log_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if math.isinf(self.max_seconds) and self.max_steps >= 1_000_000:
            raise ConfigError("training has no end; set max_steps or max_seconds")


def batches(rows: Iterator[Row], config: SftConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and loss weights, each [B, S]; weight 0 on padding."""
    shuffle = random.Random(config.seed).shuffle
    while pool := [row for _, row in zip(range(config.pool_rows), rows, strict=False)]:
        pool.sort(key=lambda row: len(row.ids))
        groups: list[list[Row]] = [[]]
        for row in pool:
            width = _padded(len(row.ids))
            if groups[-1] and (len(groups[-1]) + 1) * width > config.batch_tokens:
                groups.append([])
            groups[-1].append(row)
        shuffle(groups)
        for group in groups:
            yield _collate(group, config.context_weight)


def _padded(length: int) -> int:
    return -(-length // 64) * 64


def _collate(group: list[Row], context_weight: float) -> tuple[Tensor, Tensor]:
    width = _padded(max(len(row.ids) for row in group))
    ids_BS = np.zeros((len(group), width), dtype=np.int64)
    weights_BS = np.zeros((len(group), width), dtype=np.float32)
    for index, row in enumerate(group):
        ids_BS[index, : len(row.ids)] = row.ids
        weights_BS[index, : len(row.ids)] = np.where(row.is_sampled, 1.0, context_weight)
    return torch.from_numpy(ids_BS), torch.from_numpy(weights_BS)


def next_token_loss(
    model: KimiModel,
    ids_BS: Tensor,
    weights_BS: Tensor,
    *,
    chosen_experts: list[Tensor] | None = None,
    chunk_tokens: int = 16_384,
) -> tuple[Tensor, Tensor]:
    """Weighted mean negative log-likelihood in nats, and the share of sampled ids that are top-1.

    The vocabulary's logits are made ``chunk_tokens`` positions at a time. The experts that each
    mixture layer chose, [T, K], are appended to ``chosen_experts``.
    """
    rows, width = ids_BS.shape
    positions_T = torch.arange(width, device=ids_BS.device).repeat(rows)
    attention = FullAttention(model.config.text_config, [width] * rows)
    hidden_TD = model(ids_BS.reshape(-1), positions_T, attention, chosen_experts=chosen_experts)
    hidden_XD = hidden_TD.view(rows, width, -1)[:, :-1].reshape(rows * (width - 1), -1)
    targets_X, weights_X = ids_BS[:, 1:].reshape(-1), weights_BS[:, 1:].reshape(-1)
    kept_X = weights_X > 0
    hidden_XD, targets_X, weights_X = hidden_XD[kept_X], targets_X[kept_X], weights_X[kept_X]
    total = hidden_XD.new_zeros((), dtype=torch.float32)
    num_right = hidden_XD.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets_X), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits_XV = model.logits(hidden_XD[part]).float()
        nll_X = functional.cross_entropy(logits_XV, targets_X[part], reduction="none")
        total = total + (nll_X * weights_X[part]).sum()
        with torch.no_grad():
            is_right_X = logits_XV.argmax(-1) == targets_X[part]
            num_right += (is_right_X & (weights_X[part] == 1)).sum()
    return total / weights_X.sum(), num_right / (weights_X == 1).sum().clamp_min(1)


def learning_rate(progress: float, config: SftConfig) -> float:
    """Linear warm-up to the peak, then linear decay to 0 at ``progress`` 1."""
    if progress < config.warmup_share:
        return config.peak_lr * progress / config.warmup_share
    return config.peak_lr * max(0.0, 1 - progress) / (1 - config.warmup_share)


def _optimizer(model: KimiModel, config: SftConfig) -> torch.optim.AdamW:
    trained = [p for name, p in model.named_parameters() if _is_text(name)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_text(name))
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    is_cuda = trained[0].is_cuda
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=is_cuda)


def _is_text(name: str) -> bool:
    """Training is text only, as in the report's zero-vision stage; the eyes stay as they are."""
    return not name.startswith(("vision", "mm_projector", "projector"))


def train(model: KimiModel, rows: Iterator[Row], config: SftConfig, log: Log) -> dict[str, Any]:
    """Train in place to ``max_steps``, ``max_seconds`` or the end of ``rows``; returns totals."""
    device = next(model.parameters()).device
    optimizer = _optimizer(model, config)
    model.train()
    started_s, num_tokens, step = time.perf_counter(), 0, 0
    loss_sum, right_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    for step, (ids_BS, weights_BS) in enumerate(batches(rows, config), start=1):
        elapsed_s = time.perf_counter() - started_s
        progress = max(step / config.max_steps, elapsed_s / config.max_seconds)
        if progress > 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, config)
        ids_BS = ids_BS.to(device, non_blocking=True)  # noqa: PLW2901
        weights_BS = weights_BS.to(device, non_blocking=True)  # noqa: PLW2901
        chosen: list[Tensor] = []
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, share_right = next_token_loss(model, ids_BS, weights_BS, chosen_experts=chosen)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], config.max_grad_norm
        )
        optimizer.step()
        balance_experts(model, chosen, (weights_BS > 0).reshape(-1), config.bias_rate)
        num_tokens += int((weights_BS > 0).sum()) if device.type == "cpu" else ids_BS.numel()
        loss_sum += loss.detach()
        right_sum += share_right
        if step % config.log_every == 0:
            elapsed_s = time.perf_counter() - started_s
            log(
                {
                    "step": step,
                    "seconds": round(elapsed_s, 1),
                    "loss": round(float(loss_sum) / config.log_every, 4),
                    "top1": round(float(right_sum) / config.log_every, 4),
                    "grad_norm": round(float(norm), 3),
                    "lr": optimizer.param_groups[0]["lr"],
                    "tokens": num_tokens,
                    "tokens_per_s": round(num_tokens / elapsed_s),
                }
            )
            loss_sum.zero_()
            right_sum.zero_()
    model.eval()
    return {
        "steps": step,
        "tokens": num_tokens,
        "seconds": round(time.perf_counter() - started_s, 1),
    }


@torch.no_grad()
def balance_experts(
    model: KimiModel, chosen_experts: list[Tensor], is_real_T: Tensor, rate: float
) -> None:
    """Move each router's selection bias by ``rate`` towards the mean load of its experts."""
    mixtures = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]
    for mixture, ids_TK in zip(mixtures, chosen_experts, strict=True):
        bias_E = mixture.gate.e_score_correction_bias
        is_chosen_TE = torch.zeros(len(ids_TK), len(bias_E), device=bias_E.device)
        is_chosen_TE.scatter_(1, ids_TK, 1.0)
        load_E = is_real_T.float() @ is_chosen_TE
        bias_E += rate * torch.sign(load_E.mean() - load_E)
