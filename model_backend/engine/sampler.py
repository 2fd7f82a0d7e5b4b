"""Draw the next token of each sequence, and its log-probability under that very distribution.

    p = softmax(logits / temperature)
    id  = the token at which the running sum of p, in order of ids, passes u
    top-p below 1: keep the fewest most likely tokens whose probabilities reach top_p, most likely
    first; divide by their sum; the running sum goes in that order

``u`` in [0, 1) comes from the request's own random numbers, so the same seed gives the same ids
whatever else runs. With temperature 0 the id is the most likely one and its log-probability is
that of the plain softmax (temperature 1): a distribution that has one token has nothing to tell.
"""

# Shapes: B = sequences, V = vocabulary.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def sample(
    logits_BV: Tensor,
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    uniforms: Sequence[float],
) -> list[tuple[int, float]]:
    """Return id and log-probability (nats) of one token a row; ``logits_BV`` in float32."""
    if not any(temperatures):
        best_B = logits_BV.argmax(dim=-1)
        logprobs_B = _at(logits_BV, best_B) - logits_BV.logsumexp(dim=-1)
        return to_list(torch.stack([best_B.double(), logprobs_B.double()], dim=1))
    settings_3B = torch.tensor(
        [list(temperatures), list(top_ps), list(uniforms)],
        dtype=torch.float64,
        device=logits_BV.device,
    )
    pairs = zip(temperatures, top_ps, strict=True)
    truncates = any(temperature and top_p < 1 for temperature, top_p in pairs)
    return to_list(draw(logits_BV, settings_3B, truncates=truncates))


def draw(logits_BV: Tensor, settings_3B: Tensor, *, truncates: bool) -> Tensor:
    """Return [B, 2] float64: id and log-probability (nats) of one token a row.

    ``settings_3B`` float64 holds temperature, top-p and u of each row; without ``truncates`` no
    top-p may be below 1. Nothing here waits for the device.
    """
    temperatures_B, top_ps_B, uniforms_B = settings_3B.unbind()
    is_greedy_B = temperatures_B == 0
    divisors_B = temperatures_B.masked_fill(is_greedy_B, 1.0).float()
    logprobs_BV = (logits_BV / divisors_B[:, None]).log_softmax(dim=-1)
    sums_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    ids_B = _passed(sums_BV, uniforms_B * sums_BV[:, -1])
    ids_B = torch.where(is_greedy_B, logits_BV.argmax(dim=-1), ids_B)
    drawn_B = _at(logprobs_BV, ids_B).double()
    if truncates:
        sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
        sums_BV = sorted_BV.exp().cumsum(dim=-1, dtype=torch.float64)
        # A token is kept if those before it do not reach top_p: the first one always is.
        last_B = (sums_BV < top_ps_B[:, None]).sum(dim=-1).clamp(max=logits_BV.shape[-1] - 1)
        mass_B = _at(sums_BV, last_B)
        places_B = torch.minimum(_passed(sums_BV, uniforms_B * mass_B), last_B)
        is_whole_B = is_greedy_B | (top_ps_B >= 1)
        ids_B = torch.where(is_whole_B, ids_B, _at(order_BV, places_B))
        kept_B = _at(sorted_BV, places_B).double() - mass_B.log()
        drawn_B = torch.where(is_whole_B, drawn_B, kept_B)
    return torch.stack([ids_B.double(), drawn_B], dim=1)


def to_list(pairs_B2: Tensor) -> list[tuple[int, float]]:
    """Bring both to the host in one copy: the only one of a step."""
    return [(int(token_id), logprob) for token_id, logprob in pairs_B2.tolist()]


def _passed(sums_BV: Tensor, goals_B: Tensor) -> Tensor:
    """First place [B] of each row at which the running sum is above the goal."""
    places_B1 = torch.searchsorted(sums_BV, goals_B[:, None], right=True)
    return places_B1[:, 0].clamp(max=sums_BV.shape[-1] - 1)


def _at(x_BV: Tensor, places_B: Tensor) -> Tensor:
    return x_BV.gather(1, places_B[:, None])[:, 0]
