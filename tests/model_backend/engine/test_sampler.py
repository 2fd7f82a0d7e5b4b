"""Sampling against the distribution computed in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_sdk.model_backend.engine.sampler import sample

VOCABULARY = 50


def distribution(logits, temperature, top_p):
    """Probabilities [V] after temperature and top-p, and the order in which ids are summed."""
    scaled = logits.double().numpy() / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if top_p == 1:
        return p, np.arange(len(p))
    order = np.argsort(-p, kind="stable")
    num_kept = int((np.cumsum(p[order]) < top_p).sum()) + 1
    kept = np.zeros_like(p)
    kept[order[:num_kept]] = p[order[:num_kept]]
    return kept / kept.sum(), order


def random_logits(seed, num_rows=1):
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 3.0),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
)
def test_an_id_is_drawn_by_inverting_the_running_sum_and_has_its_probability(
    seed, temperature, top_p, uniform
):
    logits = random_logits(seed)
    ((token_id, logprob),) = sample(logits, [temperature], [top_p], [uniform])
    p, order = distribution(logits[0], temperature, top_p)
    assert logprob == pytest.approx(math.log(p[token_id]), abs=1e-4)
    place = list(order).index(token_id)
    before = p[order[:place]].sum()
    assert before - 1e-5 <= uniform <= before + p[token_id] + 1e-5


def test_the_frequencies_of_many_draws_are_the_probabilities():
    num_draws = 4000
    logits = random_logits(1).expand(num_draws, -1)
    uniforms = [(index + 0.5) / num_draws for index in range(num_draws)]
    drawn = sample(logits, [0.9] * num_draws, [0.8] * num_draws, uniforms)
    counts = np.bincount([token_id for token_id, _ in drawn], minlength=VOCABULARY)
    p, _ = distribution(logits[0], 0.9, 0.8)
    assert np.abs(counts / num_draws - p).max() <= 2 / num_draws


def test_a_row_does_not_depend_on_the_rows_beside_it():
    logits = random_logits(2, num_rows=4)
    settings_of_rows = [(0.0, 1.0, 0.3), (0.7, 0.9, 0.99), (1.3, 1.0, 0.5), (1.0, 0.01, 0.999)]
    together = sample(logits, *(list(column) for column in zip(*settings_of_rows, strict=True)))
    for row, (temperature, top_p, uniform) in enumerate(settings_of_rows):
        (alone,) = sample(logits[row : row + 1], [temperature], [top_p], [uniform])
        assert together[row][0] == alone[0]
        assert together[row][1] == pytest.approx(alone[1], abs=1e-6)


def test_temperature_zero_takes_the_most_likely_id_under_the_plain_softmax():
    logits = random_logits(3)
    ((token_id, logprob),) = sample(logits, [0.0], [0.5], [0.9])
    p, _ = distribution(logits[0], 1.0, 1.0)
    assert token_id == int(p.argmax())
    assert logprob == pytest.approx(math.log(p[token_id]), abs=1e-5)
