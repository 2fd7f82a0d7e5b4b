"""MuonClip (Kimi K2 report, arXiv:2507.20534, algorithm 1): Muon, AdamW for the rest, QK-Clip.

    matrices    M <- mu M + G                  momentum; Nesterov: U = G + mu M
                O <- NewtonSchulz5(U) * 0.2 sqrt(max(n, m))      update RMS as AdamW's
                W <- W - lr (O + wd W)
    the rest    AdamW: norms, embeddings, lm_head

    QK-Clip, after the step, for each head whose largest logit S of the batch passed tau:
                gamma = tau / S;  q_nope, k_nope *= sqrt(gamma);  q_rope *= gamma;  k_rope untouched

Joined matrices are orthogonalised apart (q_a | kv_a, gate | up), stacks of experts one by one;
matrices of one shape, of all layers, in one batched iteration. The constants of the iteration are
those of Moonshot's published code (Moonlight, examples/toy_train.py): 5 steps of (3.4445, -4.7750,
2.0315). That runs in bfloat16; so do we on CUDA, while a CPU, where bfloat16 saves nothing, runs
float32.
"""

# Shapes: n x m = one matrix, B = matrices of a batch, E = experts, Y = layers, H = heads.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.weights.names import checkpoint_tensors

if TYPE_CHECKING:
    from swarm_sdk.model_backend.model.kimi import DecoderLayer, KimiModel

NS_CONSTANTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
UPDATE_RMS = 0.2
BATCH_NUMBERS = 2**26
"""Numbers of the matrices that are held at a time to be iterated together."""
NOT_MATRICES = ("embed_tokens.", "lm_head.")
"""Matrices by shape that AdamW updates: rows of a table, not maps."""


def newton_schulz(update_Bnm: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Orthogonalise each matrix: singular values to about 1, singular vectors kept.

    ``dtype`` is that of the iteration: ``None`` is bfloat16 on CUDA and the input's elsewhere.
    """
    a, b, c = NS_CONSTANTS
    x = update_Bnm.to(dtype or (torch.bfloat16 if update_Bnm.is_cuda else update_Bnm.dtype))
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.transpose(-2, -1)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    whole: Tensor = x.transpose(-2, -1) if is_tall else x
    return whole.to(update_Bnm.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuonClipConfig:
    """Constants of Moonlight and K2; the rate is the caller's."""

    lr: float = 2e-4
    weight_decay: float = 0.1
    """Multiplied by the rate itself, not by the update's scale."""
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    tau: float = 100.0
    """QK-Clip's bound on logits."""

    def __post_init__(self) -> None:
        if self.lr < 0 or self.tau <= 0 or not 0 <= self.momentum < 1:
            raise ConfigError(
                "MuonClip needs lr >= 0, tau > 0 and 0 <= momentum < 1, got "
                f"{self.lr}, {self.tau} and {self.momentum}"
            )


Parts = tuple[tuple[int, int], ...]
"""(first row, rows) of each matrix in a joined one."""


def matrix_parts(model: KimiModel) -> dict[str, Parts]:
    """Which parameters hold matrices, and the matrices that each joins; text parameters only."""
    parts: dict[str, dict[tuple[int, int], None]] = {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for tensor in checkpoint_tensors(model.config):
        is_text = tensor.name.startswith("language_model.")
        is_matrix = len(tensor.shape) == 2 and not tensor.parameter.startswith(NOT_MATRICES)
        if is_text and is_matrix and tensor.parameter in shapes:
            first = tensor.first_row or 0
            parts.setdefault(tensor.parameter, {})[first, tensor.shape[0]] = None
    return {name: tuple(found) for name, found in parts.items()}


class MuonClip(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest; ``qk_clip`` is to be called after ``step``.

    Parameters that need no gradient are left alone. Sharded ones (FSDP2) are gathered for the
    iteration, but stacks of experts that are sharded by expert: those need nobody else.
    """

    def __init__(self, model: KimiModel, config: MuonClipConfig) -> None:
        parts = matrix_parts(model)
        groups: list[dict[str, Any]] = [
            {"params": [], "parts": [], "is_muon": True},
            {"params": [], "is_muon": False, "weight_decay": config.weight_decay},
            {"params": [], "is_muon": False, "weight_decay": 0.0},
        ]
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in parts:
                groups[0]["params"].append(parameter)
                groups[0]["parts"].append(parts[name])
            else:
                groups[1 if parameter.ndim >= 2 else 2]["params"].append(parameter)
        self.config: MuonClipConfig = config
        defaults = {"lr": config.lr, "weight_decay": config.weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                names = ("momentum",) if group["is_muon"] else ("mean", "square")
                state = self.state[parameter]
                state.update({name: torch.zeros_like(parameter) for name in names})
                if not group["is_muon"]:
                    state["step"] = torch.zeros((), dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "MuonClip takes no closure"
        for group in self.param_groups:
            if group["is_muon"]:
                self._muon(group)
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._adamw(parameter, group["lr"], group["weight_decay"])

    def _muon(self, group: dict[str, Any]) -> None:
        held: list[_Update] = []
        num_numbers = 0
        for parameter, parts in zip(group["params"], group["parts"], strict=True):
            if parameter.grad is None:
                continue
            momentum = self.state[parameter]["momentum"]
            momentum.mul_(self.config.momentum).add_(parameter.grad)
            update = parameter.grad + self.config.momentum * momentum
            held.append(_Update(parameter, parts, *_whole_matrices(update)))
            num_numbers += parameter.numel()
            if num_numbers >= BATCH_NUMBERS:
                _move(held, group["lr"], group["weight_decay"])
                held, num_numbers = [], 0
        _move(held, group["lr"], group["weight_decay"])

    def _adamw(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        beta1, beta2 = self.config.betas
        state["step"] += 1
        count = float(state["step"])
        state["mean"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean = state["mean"] / (1 - beta1**count)
        root = (state["square"] / (1 - beta2**count)).sqrt_().add_(self.config.eps)
        parameter.mul_(1 - lr * weight_decay).addcdiv_(mean, root, value=-lr)


class _Update(NamedTuple):
    """What a parameter is moved by, once its matrices are orthogonalised in place."""

    parameter: Tensor
    parts: Parts
    local: Tensor
    """Whole matrices [..., n, m]."""
    placed: Callable[[Tensor], Tensor]
    """Lays ``local`` out as the parameter is."""

    def matrices(self) -> Iterator[Tensor]:
        """Views [B, n, m] of the matrices."""
        for first, num_rows in self.parts:
            part = self.local[..., first : first + num_rows, :]
            yield part if part.ndim == 3 else part[None]


def _move(held: Sequence[_Update], lr: float, weight_decay: float) -> None:
    """Orthogonalise, matrices of one shape together, and step."""
    alike: dict[torch.Size, list[Tensor]] = {}
    for update in held:
        for part in update.matrices():
            alike.setdefault(part.shape[1:], []).append(part)
    for shape, parts in alike.items():
        whole = newton_schulz(torch.cat(parts)) * (UPDATE_RMS * max(shape) ** 0.5)
        for part, made in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.copy_(made)
    for parameter, _, local, placed in held:
        parameter.mul_(1 - lr * weight_decay).sub_(placed(local), alpha=lr)


def _whole_matrices(update: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``update`` with whole matrices on this process, and how to place it as it was."""
    if not isinstance(update, DTensor):
        return update, lambda local: local
    mesh, placements, shape = update.device_mesh, update.placements, update.shape
    if update.ndim == 3 and all(p.is_replicate() or p.is_shard(0) for p in placements):
        # Sharded by expert. Shards may be uneven, so the global shape is told.
        return update.to_local().clone(), lambda local: DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=update.stride()
        )

    def placed(local: Tensor) -> Tensor:
        whole = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return whole.redistribute(placements=placements)

    return update.full_tensor().clone(), placed


@torch.no_grad()
def qk_clip(model: KimiModel, max_logits_YH: Tensor, tau: float) -> int:
    """Scale down the query and key factors of heads whose largest logit passed ``tau``.

    ``max_logits_YH`` comes from the forward passes of the step (``FullAttention``). Returns how
    many heads were clipped. The logits of such a head are then multiplied by ``tau / S``.
    """
    text = model.config.text_config
    nope, heads = text.qk_nope_head_dim, text.num_attention_heads
    logits_YH = max_logits_YH.clamp_min(torch.finfo(max_logits_YH.dtype).tiny)
    gamma_YH = (tau / logits_YH).clamp_max(1.0)
    is_clipped_Y = (gamma_YH < 1).any(dim=1).tolist()
    for layer, gamma_H, is_clipped in zip(model.layers, gamma_YH, is_clipped_Y, strict=True):
        if not is_clipped:
            continue
        attention = cast("DecoderLayer", layer).self_attn
        root_H = gamma_H.sqrt()
        q_scale = torch.ones(heads, text.qk_head_dim, device=gamma_H.device)
        q_scale[:, :nope] = root_H[:, None]
        q_scale[:, nope:] = gamma_H[:, None]
        kv_scale = torch.ones(heads, nope + text.v_head_dim, device=gamma_H.device)
        kv_scale[:, :nope] = root_H[:, None]
        _scale_rows(attention.q_b_proj.weight, q_scale.flatten())
        _scale_rows(attention.kv_b_proj.weight, kv_scale.flatten())
    return int((gamma_YH < 1).sum())


def _scale_rows(weight: Tensor, scale_n: Tensor) -> None:
    """Multiply the rows of a matrix, whole or sharded."""
    scale_n1 = scale_n[:, None].to(weight.dtype)
    if isinstance(weight, DTensor):
        weight.mul_(distribute_tensor(scale_n1, weight.device_mesh, weight.placements))
    else:
        weight.mul_(scale_n1)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm``; returns the norm.

    Shards of several processes count together: no part of a gradient lies on two of them.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    square = torch.nn.utils.get_total_norm(local).float().square()
    if any(isinstance(g, DTensor) for g in gradients):
        torch.distributed.all_reduce(square)
    norm = float(square.sqrt())
    if norm > max_norm:
        for gradient in local:
            gradient.mul_(max_norm / (norm + 1e-6))
    return norm
