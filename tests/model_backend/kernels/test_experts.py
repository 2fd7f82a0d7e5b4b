"""The product of the routed experts, in every layout, against the plain loop in float64."""

import pytest
import torch

from swarm_sdk.model_backend.kernels.experts import (
    lay_out,
    run_all_experts,
    run_experts,
    run_experts_reference,
)
from swarm_sdk.model_backend.kernels.grouped import Batched, Looped

HIDDEN, INNER = 24, 16


def random_inputs(num_tokens, num_experts, num_chosen, seed=0):
    """Tokens, choices, weights and both stacks of matrices in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scores = torch.rand((num_tokens, num_experts), generator=generator)
    ids = scores.topk(num_chosen, dim=-1).indices
    weights = torch.rand((num_tokens, num_chosen), generator=generator, dtype=torch.float64)
    gate_up, down = normal(num_experts, 2 * INNER, HIDDEN), normal(num_experts, HIDDEN, INNER)
    return normal(num_tokens, HIDDEN), ids, weights, gate_up, down


LAYOUTS = pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen", "is_padded"),
    [(20, 8, 2, True), (64, 4, 4, False), (2, 16, 2, False), (1, 8, 1, False), (5, 1, 1, True)],
    ids=["padded", "many rows", "few choices", "one choice", "one expert"],
)


@LAYOUTS
def test_every_layout_gives_what_the_plain_loop_gives(
    num_tokens, num_experts, num_chosen, is_padded
):
    inputs = random_inputs(num_tokens, num_experts, num_chosen)
    layout = lay_out(inputs[1], *inputs[3:])
    assert type(layout.products) is (Batched if is_padded else Looped)
    torch.testing.assert_close(run_experts(*inputs), run_experts_reference(*inputs))


@LAYOUTS
def test_all_experts_over_all_tokens_give_what_the_plain_loop_gives(
    num_tokens, num_experts, num_chosen, is_padded
):
    inputs = random_inputs(num_tokens, num_experts, num_chosen)
    torch.testing.assert_close(run_all_experts(*inputs), run_experts_reference(*inputs))


@pytest.mark.parametrize("way", [run_experts, run_all_experts])
@LAYOUTS
def test_every_layout_has_the_gradients_of_the_plain_loop(
    num_tokens, num_experts, num_chosen, is_padded, way
):
    x, ids, *others = random_inputs(num_tokens, num_experts, num_chosen, seed=1)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()

    def gradients(run):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *others)]
        (run(leaves[0], ids, *leaves[1:]) * direction).sum().backward()
        return [leaf.grad for leaf in leaves]

    for ours, expected in zip(gradients(way), gradients(run_experts_reference), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_gradients_are_the_limits_of_differences():
    x, ids, weights, gate_up, down = random_inputs(3, 3, 2)
    small = (x[:, :3], weights, gate_up[:, :4, :3], down[:, :3, :2])
    assert torch.autograd.gradcheck(
        lambda x, *others: run_experts(x, ids, *others),
        [tensor.clone().requires_grad_() for tensor in small],
    )


@pytest.mark.parametrize("num_tokens", [3, 40])
def test_all_tokens_may_choose_the_same_experts_and_the_others_get_zero_gradients(num_tokens):
    x, ids, weights, gate_up, down = random_inputs(num_tokens, 8, 2)
    ids = torch.tensor([[6, 1]]).expand_as(ids).contiguous()
    gate_up.requires_grad_()
    y = run_experts(x, ids, weights, gate_up, down)
    torch.testing.assert_close(y, run_experts_reference(x, ids, weights, gate_up, down))
    y.sum().backward()
    assert gate_up.grad.flatten(1).any(dim=1).nonzero()[:, 0].tolist() == [1, 6]


def test_only_what_needs_a_gradient_gets_one():
    x, ids, weights, gate_up, down = random_inputs(9, 4, 2)
    weights.requires_grad_()
    run_experts(x, ids, weights, gate_up, down).sum().backward()
    assert weights.grad is not None
    assert x.grad is gate_up.grad is down.grad is None


def test_the_rows_of_a_layout_lie_expert_by_expert():
    _, ids, _, gate_up, down = random_inputs(90, 5, 2)
    layout = lay_out(ids, gate_up, down)
    assert layout.products.counts == ids.flatten().bincount(minlength=5).tolist()
    experts = ids.flatten()[layout.row_C.argsort()]
    assert experts.tolist() == sorted(ids.flatten().tolist())
    assert layout.token_R[layout.row_C].tolist() == [choice // 2 for choice in range(180)]


def test_under_autocast_the_products_run_in_its_dtype():
    x, ids, weights, gate_up, down = random_inputs(6, 4, 2)
    x, weights, gate_up, down = (w.float() for w in (x, weights, gate_up, down))
    exact = run_experts(x, ids, weights, gate_up, down)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = run_experts(x, ids, weights, gate_up, down)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
