"""Attention of rows over pages: the plain form against a loop in float64, the kernel against it."""

from importlib.util import find_spec

import pytest
import torch
from interpreted import mend_interpreter, run_interpreted

from swarm_sdk.model_backend.kernels.paged_attention import attend_rows, attend_rows_reference

HAS_TRITON = find_spec("triton") is not None
PAGE, LATENT, ROPE = 4, 32, 16


def random_inputs(num_rows, num_heads, seed=0, dtype=torch.float64, device="cpu"):
    """Rows at random places of 5 sequences of 7 pages that lie scattered in 40."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_rows, num_heads, LATENT + ROPE, generator=generator, dtype=torch.float64)
    kv = torch.randn(40 * PAGE, LATENT + ROPE, generator=generator, dtype=torch.float64)
    pages = torch.randperm(40, generator=generator)[:35].view(5, 7)
    sequences = torch.randint(0, 5, (num_rows,), generator=generator)
    positions = torch.randint(0, 7 * PAGE, (num_rows,), generator=generator)
    positions[0], positions[-1] = 0, 7 * PAGE - 1
    tensors = (q.to(dtype), kv.to(dtype), pages, sequences, positions)
    return [tensor.to(device) for tensor in tensors]


def run(way, inputs):
    return way(*inputs, latent=LATENT, page_size=PAGE, scale=0.3)


def test_each_row_sees_its_own_sequence_up_to_its_position():
    q, kv, pages, sequences, positions = inputs = random_inputs(9, 3)
    for row, out_HL in enumerate(run(attend_rows_reference, inputs)):
        last = int(positions[row])
        table = pages[sequences[row]].tolist()
        keys = torch.stack([kv[table[s // PAGE] * PAGE + s % PAGE] for s in range(last + 1)])
        weights = (q[row] @ keys.T * 0.3).softmax(-1)
        torch.testing.assert_close(out_HL, weights @ keys[:, :LATENT])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("num_heads", [8, 16, 20])
def test_the_kernel_gives_what_the_plain_form_gives(dtype, tolerance, num_heads):
    inputs = random_inputs(70, num_heads, dtype=dtype, device="cuda")
    truth = run(attend_rows_reference, random_inputs(70, num_heads))
    ours = run(attend_rows, inputs).double().cpu()
    assert float((ours - truth).abs().max()) <= tolerance * float(truth.abs().max())


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernel_interpreted_on_the_cpu_gives_what_the_plain_form_gives():
    run_interpreted(__file__)


if __name__ == "__main__":
    mend_interpreter()
    for heads in (3, 16, 20):
        for seed in range(3):
            given = random_inputs(9, heads, seed=seed, dtype=torch.float32)
            expected = run(attend_rows_reference, random_inputs(9, heads, seed=seed)).float()
            torch.testing.assert_close(run(attend_rows, given), expected, rtol=1e-5, atol=1e-5)
