"""The router against its formulas in float64."""

import pytest
import torch

from swarm_sdk.model_backend.kernels.router import route, route_reference


def random_inputs(num_tokens=17, width=6, num_experts=12):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight = normal(num_tokens, width), normal(num_experts, width)
    return x.requires_grad_(), weight.requires_grad_(), normal(num_experts)


def by_expert(ids_TK, weights_TK, num_experts):
    """Weights [T, E], zero where not chosen: the order of the choices is nobody's business."""
    return weights_TK.new_zeros(len(ids_TK), num_experts).scatter(1, ids_TK, weights_TK)


@pytest.mark.parametrize("num_chosen", [1, 3, 12])
def test_choices_weights_and_gradients_are_those_of_the_formulas(num_chosen):
    x, weight, bias = random_inputs()
    ours = by_expert(*route(x, weight, bias, num_chosen, 2.5), 12)
    expected = by_expert(*route_reference(x, weight, bias, num_chosen, 2.5), 12)
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    found = [torch.autograd.grad((one * direction).sum(), (x, weight)) for one in (ours, expected)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_the_limit_of_differences():
    x, weight, bias = random_inputs(4)
    assert torch.autograd.gradcheck(lambda *of: route(*of, bias, 3, 2.0)[1], (x, weight))


def test_weights_are_float32_under_autocast_and_for_bfloat16():
    x, weight, bias = (one.detach() for one in random_inputs())
    exact = by_expert(*route(x, weight, bias, 3, 1.0), 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = route(x.float(), weight.float(), bias.float(), 3, 1.0)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(by_expert(*found, 12).double(), exact)
    assert route(x.bfloat16(), weight.bfloat16(), bias.float(), 3, 1.0)[1].dtype == torch.float32
