"""Triton's kernels, by its interpreter on a CPU, against the plain functions beside them."""

import pytest
import torch

from swarm_sdk.model_backend.kernels import experts, fused, logprob, router
from swarm_sdk.model_backend.kernels.experts import run_experts, run_experts_reference
from swarm_sdk.model_backend.kernels.grouped import Looped, Mixed, Tiled, TileShape

pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def everywhere(monkeypatch):
    """Let the operations take Triton's kernels on this machine."""
    monkeypatch.setattr(fused, "can_run", lambda x: x.dtype in fused.DTYPES)
    monkeypatch.setattr(fused, "can_load_tiles", fused.can_run)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(found, expected, **tolerances):
    tolerances = tolerances or {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerances)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tiles_of_logits_merge_and_turn_into_their_gradient(everywhere, monkeypatch, temperature):
    monkeypatch.setattr(logprob, "CPU_TILE", 1)
    hidden, weight = normal(7, 16).requires_grad_(), normal(600, 16, seed=1) / 4
    weight.requires_grad_()
    targets = torch.arange(7, device=DEVICE) * 95
    found = logprob.linear_logprobs(
        hidden, weight, targets, temperature=temperature, with_entropy=True
    )
    expected = logprob.linear_logprobs_reference(hidden, weight, targets, temperature=temperature)
    close(found.logprobs_X, expected.logprobs_X)
    close(found.entropy_X, expected.entropy_X, rtol=1e-4, atol=1e-4)
    for one in ("both", "logprobs"):
        sums = [
            (f.logprobs_X * hidden.detach()[:, 0]).sum()
            + (one == "both") * (f.entropy_X * hidden.detach()[:, 1]).sum()
            for f in (found, expected)
        ]
        gradients = [
            torch.autograd.grad(total, (hidden, weight), retain_graph=True) for total in sums
        ]
        close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [16, 24, 5000])
def test_swiglu_and_its_backward_pass(inner):
    h, weights, d_a = normal(5, 2 * inner), normal(5, seed=1), normal(5, inner, seed=2)
    close(fused.swiglu(h, weights), experts.swiglu(h, weights))
    for found, expected in zip(
        fused.swiglu_backward(h, weights, d_a),
        experts.swiglu_backward(h, weights, d_a.clone()),
        strict=True,
    ):
        close(found, expected, rtol=1e-4, atol=1e-4)


def test_rows_are_summed_by_token():
    y, rows = normal(12, 40), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    rows = rows.to(DEVICE)
    close(fused.combine(y, rows, 3), experts.combine(y, rows, 3))


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(384, 8), (5, 3), (4, 1)])
def test_experts_are_chosen_by_biased_scores(num_experts, num_chosen):
    logits, bias = normal(6, num_experts), normal(num_experts, seed=1) * 0.3
    found, expected = (
        turn(logits, bias, num_chosen, 2.5) for turn in (fused.choose, router.choose)
    )
    orders = [one[0].argsort(dim=-1) for one in (found, expected)]
    for ours, plain in zip(found, expected, strict=True):
        close(ours.gather(1, orders[0]), plain.gather(1, orders[1]))


COUNTS = pytest.mark.parametrize(
    "counts", [[3, 0, 70, 20], [0, 0, 0, 9], [16, 16, 16, 16], [1, 0, 0, 0]], ids=str
)


@COUNTS
def test_tiled_products_are_those_of_a_loop(counts):
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    tiled, looped = Tiled(ends, sum(counts), TileShape(16, 32, 16, 4, 2)), Looped(counts)
    x, y, w = normal(sum(counts), 48), normal(sum(counts), 80, seed=1), normal(4, 80, 48, seed=2)
    tolerances = {"rtol": 1e-4, "atol": 1e-4}
    close(tiled.apply(x, w), looped.apply(x, w), **tolerances)
    close(tiled.pull(y, w), looped.pull(y, w), **tolerances)
    close(tiled.outer(y, x), looped.outer(y, x), **tolerances)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 wrongly")
@COUNTS
def test_mixed_products_are_those_of_a_loop(counts):
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    mixed, looped = Mixed(ends, sum(counts), TileShape(16, 32, 16, 4, 2)), Looped(counts)
    x, y, w = (
        one.bfloat16()
        for one in (normal(sum(counts), 48), normal(sum(counts), 80, seed=1), normal(4, 80, 48))
    )
    tolerances = {"rtol": 2e-2, "atol": 2e-2}
    close(mixed.apply(x, w), looped.apply(x, w), **tolerances)
    close(mixed.pull(y, w), looped.pull(y, w), **tolerances)
    close(mixed.outer(y, x), looped.outer(y, x), **tolerances)


@pytest.mark.parametrize("is_one_expert", [True, False])
def test_all_of_the_experts_runs_by_tiles_and_fused_kernels(everywhere, is_one_expert):
    num_tokens, num_experts, hidden, inner = 40, 4, 64, 32
    ids = normal(num_tokens, num_experts).topk(2, dim=-1).indices
    if is_one_expert:
        ids = torch.full_like(ids[:, :1], 2)
    leaves = [
        one.requires_grad_()
        for one in (
            normal(num_tokens, hidden),
            normal(*ids.shape, seed=3),
            normal(num_experts, 2 * inner, hidden, seed=4) / 8,
            normal(num_experts, hidden, inner, seed=5) / 8,
        )
    ]
    layout = experts.lay_out(ids, *leaves[2:])
    assert isinstance(layout.products, Tiled)
    found = run_experts(leaves[0], ids, *leaves[1:])
    expected = run_experts_reference(leaves[0], ids, *leaves[1:])
    close(found, expected, rtol=1e-4, atol=1e-4)
    direction = normal(*found.shape, seed=6)
    for ours, plain in zip(
        *(torch.autograd.grad((y * direction).sum(), leaves) for y in (found, expected)),
        strict=True,
    ):
        close(ours, plain, rtol=1e-3, atol=1e-4)
