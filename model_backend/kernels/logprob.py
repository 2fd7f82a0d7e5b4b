"""Log-probabilities of tokens behind the output matrix, without tokens x vocabulary in memory.

    logits = hidden W^T / temperature        one tile at a time: some rows, some of the vocabulary
    forward    tile ─> its log sum exp and mean logit, merged; logit of the target ─> log p, entropy
    backward   tile again ─> d logits in its place ─> d hidden += d logits W
                                                      d W += d logits^T hidden

What is kept between the passes is one number a row (log sum exp), so the vocabulary is as large as
it likes; the price is the tile's product once more, but where all fits in one tile, which is then
kept. With g the gradient of log p and h that of the entropy H,

    d logit_v = [v is the target] g - p_v (g + h (log p_v + H))

Sums are float32 (float64 for float64) whatever the dtype of the products, which is that of
``KimiModel.logits``: the dtype of autocast where that is on.
"""

# Shapes: X = tokens, D = hidden, V = vocabulary; x, v = those of one tile.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from swarm_sdk.model_backend.kernels import fused

ROWS = 8_192
"""Rows of one tile at most, on a GPU: products as large as they need to be to run at full speed."""
TILE = 1 << 26
"""Logits of one tile at most."""
CPU_TILE = 1 << 24
"""The same on a CPU; with 2**22, 3,000 rows of a vocabulary of 4,096 took a fifth longer."""


class LinearLogprobs(NamedTuple):
    """What is known of each token's distribution."""

    logprobs_X: Tensor
    """log p of the target, in nats."""
    entropy_X: Tensor | None
    """Entropy in nats, where it was asked for."""


def linear_logprobs_reference(
    hidden_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, *, temperature: float = 1.0
) -> LinearLogprobs:
    """All logits at once: the truth that ``linear_logprobs`` keeps."""
    logits_XV = functional.linear(hidden_XD, weight_VD) / temperature
    logprobs_XV = logits_XV.log_softmax(-1)
    entropy_X = -(logprobs_XV.exp() * logprobs_XV).sum(-1)
    return LinearLogprobs(logprobs_XV.gather(1, targets_X[:, None])[:, 0], entropy_X)


def linear_logprobs(
    hidden_XD: Tensor,
    weight_VD: Tensor,
    targets_X: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> LinearLogprobs:
    """Log-probabilities [X] of ``targets_X`` (int64) under ``softmax(hidden W^T / temperature)``.

    Differentiable in ``hidden_XD`` and ``weight_VD``, once. Results are float32 (float64 for
    float64 inputs).
    """
    kind = hidden_XD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_XD, weight_VD = hidden_XD.to(dtype), weight_VD.to(dtype)
    with torch.autocast(kind, enabled=False):
        logprobs_X, entropy_X = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_XD, weight_VD, targets_X, temperature, with_entropy
        )
    return LinearLogprobs(logprobs_X, entropy_X if with_entropy else None)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_XD: Tensor,
        weight_VD: Tensor,
        targets_X: Tensor,
        temperature: float,
        with_entropy: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_XD.dtype, torch.float32)
        log_sum_X = hidden_XD.new_full((len(hidden_XD),), -torch.inf, dtype=wide)
        mean_X, target_X = torch.zeros_like(log_sum_X), torch.zeros_like(log_sum_X)
        tiles = _tiles(hidden_XD, weight_VD)
        kept_xv = None
        for rows, words in tiles:
            logits_xv = functional.linear(hidden_XD[rows], weight_VD[words])
            targets_x = targets_X[rows] - words.start
            stats = (log_sum_X[rows], mean_X[rows], target_X[rows])
            if fused.can_run(logits_xv):
                fused.tile_stats(logits_xv, targets_x, stats, temperature)
                kept_xv = logits_xv
            else:
                kept_xv = tile_stats(
                    logits_xv, targets_x, stats, temperature, with_entropy=with_entropy
                )
        entropy_X = log_sum_X - mean_X
        ctx.save_for_backward(hidden_XD, weight_VD, targets_X, log_sum_X, entropy_X)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        ctx.kept_xv = kept_xv if len(tiles) == 1 else None
        return target_X - log_sum_X, entropy_X

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_XD, weight_VD, targets_X, log_sum_X, entropy_X = ctx.saved_tensors
        of_logprob_X, of_entropy_X = gradients[:2]
        if not ctx.with_entropy:
            of_entropy_X = None
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden_XD = _Sum(hidden_XD) if needs_hidden else None
        d_weight_VD = _Sum(weight_VD) if needs_weight else None
        for rows, words in _tiles(hidden_XD, weight_VD):
            hidden_xD, weight_vD = hidden_XD[rows], weight_VD[words]
            columns = (targets_X[rows] - words.start, log_sum_X[rows], of_logprob_X[rows])
            extra = None if of_entropy_X is None else (entropy_X[rows], of_entropy_X[rows])
            tile_xv, ctx.kept_xv = ctx.kept_xv, None  # it is overwritten
            is_kept = tile_xv is not None
            if tile_xv is None:
                tile_xv = functional.linear(hidden_xD, weight_vD)
            if fused.can_run(tile_xv):
                d_logits_xv = fused.tile_gradient(tile_xv, columns, extra, ctx.temperature)
            else:
                if not is_kept:
                    tile_xv = _scaled(tile_xv, ctx.temperature, log_sum_X.dtype)
                    tile_xv = tile_xv.sub_(log_sum_X[rows, None])
                d_logits_xv = tile_gradient(tile_xv, columns, extra, ctx.temperature)
                d_logits_xv = d_logits_xv.to(hidden_XD.dtype)
            if d_hidden_XD is not None:
                d_hidden_XD.add(rows, d_logits_xv, weight_vD)
            if d_weight_VD is not None:
                d_weight_VD.add(words, d_logits_xv.t(), hidden_xD)
        return (
            d_hidden_XD.total if d_hidden_XD is not None else None,
            d_weight_VD.total if d_weight_VD is not None else None,
            None,
            None,
            None,
        )


class _Sum:
    """Products summed into the rows of a gradient; several of them in float32."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.parts: dict[int, tuple[slice, Tensor]] = {}

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right`` to the rows."""
        found = self.parts.get(rows.start)
        if found is None:
            self.parts[rows.start] = (rows, left @ right)
        elif found[1].dtype == left.dtype and left.dtype.itemsize >= 4:
            found[1].addmm_(left, right)
        else:
            wide = found[1].float()  # the same object from the second sum on
            self.parts[rows.start] = (rows, wide.add_(left @ right))

    @property
    def total(self) -> Tensor:
        """The gradient in the dtype of its tensor."""
        if not self.parts:
            return torch.zeros_like(self.like)
        parts = [self.parts[start][1] for start in sorted(self.parts)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.to(self.like.dtype)


def _tiles(hidden_XD: Tensor, weight_VD: Tensor) -> list[tuple[slice, slice]]:
    """Rows and words of each tile."""
    num_rows, num_words = len(hidden_XD), len(weight_VD)
    is_cpu = hidden_XD.device.type == "cpu"
    tile = CPU_TILE if is_cpu else TILE
    rows = max(1, min(num_rows, max(256, tile // num_words) if is_cpu else ROWS))
    words = min(num_words, max(256, tile // rows))
    return [
        (slice(row, min(row + rows, num_rows)), slice(word, min(word + words, num_words)))
        for word in range(0, num_words, words)
        for row in range(0, num_rows, rows)
    ]


def tile_stats(
    logits_xv: Tensor,
    targets_x: Tensor,
    stats: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    *,
    with_entropy: bool,
) -> Tensor:
    """Merge a tile into each row's log sum exp, mean logit and target logit; its log-probs."""
    log_sum_x, mean_x, target_x = stats
    logits_xv = _scaled(logits_xv, temperature, log_sum_x.dtype)
    is_here_x = (targets_x >= 0) & (targets_x < logits_xv.shape[1])
    places_x1 = targets_x.clamp(0, logits_xv.shape[1] - 1)[:, None]
    found_x = logits_xv.gather(1, places_x1)[:, 0]
    logprobs_xv = logits_xv.log_softmax(-1)
    own_x = found_x - logprobs_xv.gather(1, places_x1)[:, 0]
    merged_x = torch.logaddexp(log_sum_x, own_x)
    if with_entropy:
        own_mean_x = (logprobs_xv.exp() * logits_xv).sum(-1)
        mean_x.mul_((log_sum_x - merged_x).exp()).add_(own_mean_x * (own_x - merged_x).exp())
    log_sum_x.copy_(merged_x)
    target_x.copy_(torch.where(is_here_x, found_x, target_x))
    return logprobs_xv


def tile_gradient(
    logprobs_xv: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    extra: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> Tensor:
    """The gradient of the tile's logits; its log-probs are overwritten."""
    targets_x, _, of_logprob_x = columns
    if extra is None:
        d_xv = logprobs_xv.exp_().mul_(-of_logprob_x[:, None])
    else:
        entropy_x, of_entropy_x = extra
        powers_xv = logprobs_xv.exp()
        d_xv = logprobs_xv.add_(entropy_x[:, None]).mul_(-of_entropy_x[:, None])
        d_xv.sub_(of_logprob_x[:, None]).mul_(powers_xv)
    is_here_x = (targets_x >= 0) & (targets_x < d_xv.shape[1])
    places_x1 = targets_x.clamp(0, d_xv.shape[1] - 1)[:, None]
    d_xv.scatter_add_(1, places_x1, (of_logprob_x * is_here_x)[:, None])
    return d_xv if temperature == 1.0 else d_xv.div_(temperature)


def _scaled(logits_xv: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits_xv = logits_xv.to(dtype)
    return logits_xv if temperature == 1.0 else logits_xv / temperature
