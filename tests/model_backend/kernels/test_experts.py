"""The product of the routed experts, in every layout, against the plain loop in float64."""

import pytest
import torch

from swarm_sdk.model_backend.kernels.experts import (
    _lay_out,
    run_all_experts,
    run_experts,
    run_experts_reference,
)

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
    layout = _lay_out(inputs[1], num_experts, can_group=False)
    assert isinstance(layout.rows_per_expert, int) == is_padded
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


def test_all_tokens_may_choose_the_same_experts():
    x, ids, weights, gate_up, down = random_inputs(40, 8, 2)
    ids = torch.tensor([[6, 1]]).expand_as(ids).contiguous()
    torch.testing.assert_close(
        run_experts(x, ids, weights, gate_up, down),
        run_experts_reference(x, ids, weights, gate_up, down),
    )


def test_the_rows_of_a_grouped_product_lie_expert_by_expert():
    _, ids, *_ = random_inputs(9, 5, 2)
    layout = _lay_out(ids, 5, can_group=True)
    assert layout.ends_E.tolist() == [int((ids <= expert).sum()) for expert in range(5)]
    experts = ids.flatten()[layout.row_C.argsort()]
    assert experts.tolist() == sorted(ids.flatten().tolist())
    assert layout.token_R[layout.row_C].tolist() == [choice // 2 for choice in range(18)]


def test_under_autocast_the_products_run_in_its_dtype():
    x, ids, weights, gate_up, down = random_inputs(6, 4, 2)
    x, weights, gate_up, down = (w.float() for w in (x, weights, gate_up, down))
    exact = run_experts(x, ids, weights, gate_up, down)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = run_experts(x, ids, weights, gate_up, down)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
