"""Our kernels of packed attention, by Triton's interpreter on a CPU, against the plain form."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from swarm_sdk.model_backend.kernels import attention
from swarm_sdk.model_backend.kernels.attention import (
    Packing,
    packed_attention,
    packed_attention_reference,
    tiled_attention,
)
from swarm_sdk.model_backend.kernels.tiled_attention import Tile, Tiles, Work, parts_of

HAS_TRITON = find_spec("triton") is not None
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
WIDTHS = {"48/32": (48, 32), "24/24": (24, 24), "16/8": (16, 8)}
"""Two parts and one; parts wider than the head; a head narrower than any part."""
PACKINGS = {
    "alone": ([37, 1, 16, 70, 2], ()),
    "prefixes": ([33, 5, 1, 40, 20, 3, 35, 17], (None, 0, 0, None, 3, 0, 3, None)),
    "prefix of one token": ([1, 50, 1], (None, 0, 0)),
}
TILES = (
    Tiles(Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)),
    Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2)),
)


def compare(lengths, prefix_of, widths, is_causal, tiles, dtype, tolerance, device="cpu"):
    """Raise unless values and gradients are those of the plain form in float64."""
    width, value_width = widths
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_heads = sum(lengths), 3
    shapes = [(num_tokens, num_heads, size) for size in (width, width, value_width, value_width)]
    *leaves, direction = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    exact = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    packing = Packing.of(lengths, leaves[0].device, prefix_of)
    options = {"scale": 0.3, "is_causal": is_causal}
    found = tiled_attention(*leaves, packing, **options, tiles=tiles)
    expected = packed_attention_reference(*exact, packing, **options)
    pairs = [
        (found, expected),
        *zip(
            torch.autograd.grad(found, leaves, direction),
            torch.autograd.grad(expected, exact, direction.double()),
            strict=True,
        ),
    ]
    for name, (ours, truth) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        assert ours.shape == truth.shape
        error = float((ours.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max())
        assert error <= tolerance, (name, error, lengths, prefix_of, widths, is_causal, str(tiles))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_values_and_gradients_interpreted_on_the_cpu_are_those_of_the_plain_form():
    """In a process of its own: Triton reads the variable when it is loaded."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def mend_interpreter():
    """numpy 2.4 makes no int of an array of one number, which Triton 3.6's interpreter asks for."""
    from triton.runtime import interpreter

    scope = interpreter._LangPatchScope
    set_attr = scope.set_attr

    def set_mended(self, owner, name, value):
        if name == "__index__":
            value = lambda tensor: int(tensor.handle.data.item())  # noqa: E731
        set_attr(self, owner, name, value)

    scope.set_attr = set_mended


if __name__ == "__main__":
    mend_interpreter()
    for cut in TILES:
        for given in PACKINGS.values():
            for sizes in WIDTHS.values():
                for causal in (True, False):
                    compare(*given, sizes, causal, cut, torch.float32, 1e-5)
