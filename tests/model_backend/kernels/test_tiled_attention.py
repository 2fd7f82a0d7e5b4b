"""Our kernels of packed attention, by Triton's interpreter on a CPU, against the plain form."""

from importlib.util import find_spec

import pytest
import torch
from interpreted import mend_interpreter, run_interpreted

from swarm_sdk.model_backend.kernels import attention
from swarm_sdk.model_backend.kernels.attention import (
    Packing,
    packed_attention,
    packed_attention_reference,
    tiled_attention,
)
from swarm_sdk.model_backend.kernels.tiled_attention import Tile, Tiles, Work, parts_of

HAS_TRITON = find_spec("triton") is not None
WIDTHS = {"48/32": (48, 32), "24/24": (24, 24), "16/8": (16, 8)}
"""Two parts and one; parts wider than the head; a head narrower than any part."""
PACKINGS = {
    "alone": ([37, 1, 16, 70, 2], ()),
    "prefixes": ([33, 5, 1, 40, 20, 3, 35, 17], (None, 0, 0, None, 3, 0, 3, None)),
    "prefix of one token": ([1, 50, 1], (None, 0, 0)),
}
WIDE_KEYS = Tiles(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2))
WIDE_QUERIES = Tiles(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2))
CPU = torch.device("cpu")


def compare(
    lengths, prefix_of, widths, is_causal, tiles, dtype, tolerance, device="cpu", scale=0.3
):
    """Raise unless values and gradients are those of the plain form in float64."""
    width, value_width = widths
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_heads = sum(lengths), 2
    shapes = [(num_tokens, num_heads, size) for size in (width, width, value_width, value_width)]
    *leaves, direction = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    exact = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    packing = Packing(lengths, leaves[0].device, prefix_of)
    options = {"scale": scale, "is_causal": is_causal}
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
        error = float(
            (ours.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max()
        )
        assert error <= tolerance, (name, error, lengths, prefix_of, widths, is_causal, str(tiles))


@pytest.mark.parametrize("size", [1, 16, 64])
@pytest.mark.parametrize("name", PACKINGS)
def test_tiles_cover_each_token_once_and_ranges_each_query_that_sees_a_key(name, size):
    lengths, prefix_of = PACKINGS[name]
    work = Work(lengths, prefix_of, CPU)
    tokens = range(sum(lengths))
    sequence = [index for index, length in enumerate(lengths) for _ in range(length)]
    before = prefix_of or (None,) * len(lengths)
    for tiles in (work.of_queries(size), work.of_keys(size)):
        rows = [row for first, end, *_ in tiles.tolist() for row in range(first, end)[:size]]
        assert sorted(rows) == list(tokens)
    for row, end, own, first, last in work.of_queries(size).tolist():
        seen = {*range(own, end), *range(first, last)}
        assert seen == {t for t in tokens if sequence[t] in (sequence[row], before[sequence[row]])}
    for row, _, first, last in work.of_keys(size).tolist():
        ranges = work.ranges().tolist()[first:last]
        readers = [t for start, end in ranges for t in range(start, end)]
        wanted = [t for t in tokens if sequence[row] in (sequence[t], before[sequence[t]])]
        assert readers == wanted


def test_the_longest_work_of_a_sequence_and_the_longest_sequence_come_first():
    work = Work([3, 40, 8], (None, None, 1), CPU)
    assert work.of_queries(16)[:, 0].tolist() == [43, 35, 19, 3, 0]
    assert work.of_keys(16)[:, 0].tolist() == [3, 19, 35, 43, 0]


def test_neighbours_behind_one_prefix_are_one_range():
    assert Work([4, 2, 3, 5, 1], (None, 0, 0, None, 0), CPU).ranges()[:2].tolist() == [
        [0, 9],
        [14, 15],
    ]


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (192, (128, 64)),
        (128, (128, 0)),
        (72, (64, 16)),
        (32, (32, 0)),
        (24, (16, 16)),
        (8, (16, 0)),
    ],
)
def test_a_width_is_held_by_two_powers_of_two(width, parts):
    assert parts_of(width) == parts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("widths", [(192, 128), (64, 32), (72, 72)])
def test_values_and_gradients_on_cuda_are_those_of_the_plain_form(widths, is_causal, dtype):
    for lengths, prefix_of in (*PACKINGS.values(), ([300, 1, 700, 129], (None, 0, 0, None))):
        compare(lengths, prefix_of, widths, is_causal, None, dtype, 2e-2, "cuda", scale=0.07)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_packed_attention_runs_the_tiles_and_gives_the_same_each_time(monkeypatch):
    monkeypatch.delattr(attention, "flash_attention")
    q, k, v = (
        torch.randn(900, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    packing = Packing([500, 150, 250], q.device, (None, 0, 0))

    def step():
        out = packed_attention(q, k, v, packing, scale=0.1, is_causal=True)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    assert all(torch.equal(*pair) for pair in zip(step(), step(), strict=True))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_values_and_gradients_interpreted_on_the_cpu_are_those_of_the_plain_form():
    run_interpreted(__file__)


if __name__ == "__main__":
    mend_interpreter()
    for given in PACKINGS.values():
        for sizes in WIDTHS.values():
            for causal in (True, False):
                compare(*given, sizes, causal, WIDE_KEYS, torch.float32, 1e-5)
    for causal in (True, False):
        compare(*PACKINGS["prefixes"], (48, 32), causal, WIDE_QUERIES, torch.float32, 1e-5)
        compare(*PACKINGS["prefixes"], (48, 32), causal, WIDE_KEYS, torch.float16, 5e-3)
