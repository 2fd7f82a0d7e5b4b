"""Draw the next token of each sequence, and its log-probability under that very distribution.

    p = softmax(logits / temperature)
    top-p: keep the fewest most likely tokens whose probabilities reach top_p; divide by their sum
    id  = the token at which the running sum of p passes u: most likely first where top-p needs the
          tokens sorted, in the order of ids otherwise

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
        best_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        logprobs_B1 = logits_BV.gather(1, best_B1) - logits_BV.logsumexp(dim=-1, keepdim=True)
        return _to_list(best_B1, logprobs_B1)

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_BV.device)[:, None]

    vocab_size = logits_BV.shape[-1]
    temperatures_B1 = column(temperatures, torch.float32)
    top_ps_B1 = column(top_ps, torch.float64)
    is_greedy_B1 = temperatures_B1 == 0
    logprobs_BV = (logits_BV / temperatures_B1.masked_fill(is_greedy_B1, 1.0)).log_softmax(dim=-1)
    order_BV = _order(logprobs_BV, temperatures, top_ps)
    in_turn_BV = logprobs_BV if order_BV is None else logprobs_BV.gather(1, order_BV)
    sums_BV = in_turn_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    # A token is kept if those before it do not reach top_p: the first one always is.
    num_kept_B1 = (sums_BV < top_ps_B1).sum(dim=-1, keepdim=True) + 1
    num_kept_B1 = num_kept_B1.clamp(max=vocab_size).masked_fill(top_ps_B1 >= 1, vocab_size)
    mass_B1 = sums_BV.gather(1, num_kept_B1 - 1)
    uniforms_B1 = column(uniforms, torch.float64)
    place_B1 = torch.searchsorted(sums_BV, uniforms_B1 * mass_B1, right=True)
    place_B1 = torch.minimum(place_B1, num_kept_B1 - 1)
    ids_B1 = place_B1 if order_BV is None else order_BV.gather(1, place_B1)
    ids_B1 = ids_B1.where(~is_greedy_B1, logprobs_BV.argmax(dim=-1, keepdim=True))
    log_mass_B1 = mass_B1.log().masked_fill(is_greedy_B1 | (top_ps_B1 >= 1), 0.0)
    return _to_list(ids_B1, logprobs_BV.gather(1, ids_B1) - log_mass_B1)


def _order(
    logprobs_BV: Tensor, temperatures: Sequence[float], top_ps: Sequence[float]
) -> Tensor | None:
    """Ids [B, V] in the order in which a row sums them; ``None`` if no row needs them sorted."""
    pairs = zip(temperatures, top_ps, strict=True)
    rows = [row for row, (temperature, top_p) in enumerate(pairs) if temperature and top_p < 1]
    if not rows:
        return None
    num_rows, vocab_size = logprobs_BV.shape
    order_BV = torch.arange(vocab_size, device=logprobs_BV.device).repeat(num_rows, 1)
    order_BV[rows] = logprobs_BV[rows].argsort(dim=-1, descending=True, stable=True)
    return order_BV


def _to_list(ids_B1: Tensor, logprobs_B1: Tensor) -> list[tuple[int, float]]:
    """Bring both to the host in one copy: the only one of a step."""
    pairs = torch.cat([ids_B1.double(), logprobs_B1.double()], dim=1).tolist()
    return [(int(token_id), logprob) for token_id, logprob in pairs]
