"""Log-probabilities tile by tile against all logits at once in float64."""

import pytest
import torch

from swarm_sdk.model_backend.kernels import logprob
from swarm_sdk.model_backend.kernels.logprob import linear_logprobs, linear_logprobs_reference


def random_inputs(num_rows=11, width=6, num_words=700, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(num_words, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(num_words, (num_rows,), generator=generator)
    return hidden, weight, targets


def gradients(found, leaves, *, with_entropy):
    """Of a weighted sum, so that every row counts differently."""
    weights = torch.linspace(-1, 2, len(found.logprobs_X), dtype=found.logprobs_X.dtype)
    total = (weights * found.logprobs_X).sum()
    if with_entropy:
        total = total + (weights.flip(0) * found.entropy_X).sum()
    return torch.autograd.grad(total, leaves)


@pytest.fixture(params=["one tile", "tiles of rows", "tiles of rows and words"])
def tiles(request, monkeypatch):
    """Tiles at least 256 long, so 300 rows and 700 words make several."""
    if request.param != "one tile":
        monkeypatch.setattr(logprob, "CPU_TILE", 1)
    if request.param == "tiles of rows and words":
        return 300, 700
    return 300, 256


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_values_and_gradients_are_those_of_all_logits_at_once(tiles, temperature, with_entropy):
    hidden, weight, targets = random_inputs(tiles[0], 6, tiles[1])
    ours = linear_logprobs(
        hidden, weight, targets, temperature=temperature, with_entropy=with_entropy
    )
    expected = linear_logprobs_reference(hidden, weight, targets, temperature=temperature)
    torch.testing.assert_close(ours.logprobs_X, expected.logprobs_X)
    if with_entropy:
        torch.testing.assert_close(ours.entropy_X, expected.entropy_X)
    else:
        assert ours.entropy_X is None
    leaves = (hidden, weight)
    torch.testing.assert_close(
        gradients(ours, leaves, with_entropy=with_entropy),
        gradients(expected, leaves, with_entropy=with_entropy),
    )


def test_the_gradient_is_the_limit_of_differences():
    hidden, weight, targets = random_inputs(3, 4, 9)

    def both(hidden, weight):
        return linear_logprobs(hidden, weight, targets, temperature=1.3, with_entropy=True)[:2]

    # The kept tile and one made again may differ in the last bit.
    assert torch.autograd.gradcheck(both, (hidden, weight), nondet_tol=1e-12)


def test_a_kept_tile_may_be_gone_through_twice():
    hidden, weight, targets = random_inputs()
    total = linear_logprobs(hidden, weight, targets).logprobs_X.sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, (hidden, weight)), first)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = random_inputs()
    weight = weight.detach()
    linear_logprobs(hidden, weight, targets).logprobs_X.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_rows_give_no_logprobs_and_zero_gradients():
    hidden, weight, targets = random_inputs(0)
    logprobs = linear_logprobs(hidden, weight, targets).logprobs_X
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert not weight.grad.any()


def test_products_run_in_the_dtype_of_autocast_and_sums_in_float32(tiles):
    hidden, weight, targets = random_inputs(tiles[0], 64, tiles[1], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logprobs(hidden, weight, targets).logprobs_X
    assert ours.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden.bfloat16(), weight.bfloat16()).float()
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    exact = torch.autograd.grad(
        linear_logprobs_reference(hidden, weight, targets).logprobs_X.sum(), (hidden, weight)
    )
    for found, expected in zip((hidden.grad, weight.grad), exact, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.03


def test_logits_beyond_the_range_of_the_exponential_are_no_harm(tiles):
    hidden, weight, targets = random_inputs(tiles[0], 6, tiles[1])
    ours = linear_logprobs(hidden * 1e3, weight, targets, with_entropy=True)
    expected = linear_logprobs_reference(hidden * 1e3, weight, targets)
    torch.testing.assert_close(ours.logprobs_X, expected.logprobs_X)
    torch.testing.assert_close(ours.entropy_X, expected.entropy_X, rtol=1e-6, atol=1e-6)
