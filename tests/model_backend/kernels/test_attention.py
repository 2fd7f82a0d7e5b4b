"""Packed sequences lie where they should; the kernels give what attention one by one gives."""

import pytest
import torch
from torch.nn import functional

from swarm_sdk.model_backend.kernels.attention import (
    Packing,
    efficient_attention,
    flash_attention,
    packed_attention,
    packed_attention_reference,
)

LENGTHS, PREFIX_OF = (5, 3, 1, 7, 2), (None, 0, 0, None, 3)


def random_inputs(num_heads=2, width=8, value_width=6, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), num_heads, size) for size in (width, width, value_width)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("prefix_of", [PREFIX_OF, (None,) * 5], ids=["prefixes", "alone"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_each_sequence_attends_to_its_own_tokens_behind_its_prefix(prefix_of, is_causal):
    q, k, v = random_inputs()
    packing = Packing(LENGTHS, q.device, prefix_of)
    found = packed_attention_reference(q, k, v, packing, scale=0.4, is_causal=is_causal)
    qs, ks, vs = (x.split(LENGTHS) for x in (q, k, v))
    for index, (out, before) in enumerate(zip(found.split(LENGTHS), prefix_of, strict=True)):
        own = [index] if before is None else [before, index]
        keys, values = (torch.cat([x[one] for one in own]) for x in (ks, vs))
        num_before = len(keys) - len(out)
        is_seen = torch.ones(len(out), len(keys), dtype=torch.bool).tril(num_before)
        expected = functional.scaled_dot_product_attention(
            qs[index].transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=is_seen if is_causal else None,
            scale=0.4,
        )
        torch.testing.assert_close(out, expected.transpose(0, 1))


def test_sequences_without_prefixes_share_their_ends_and_copy_no_keys():
    packing = Packing(LENGTHS, torch.device("cpu"))
    assert packing.q_ends.tolist() == packing.k_ends.tolist() == [0, 5, 8, 9, 16, 18]
    assert packing.key_rows is None
    assert packing.max_q == packing.max_k == 7


def test_longest_keys_count_the_prefix():
    packing = Packing(LENGTHS, torch.device("cpu"), PREFIX_OF)
    assert packing.k_ends.tolist() == [0, 5, 13, 19, 26, 35]
    assert (packing.max_q, packing.max_k) == (7, 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("run", [packed_attention, flash_attention, efficient_attention])
def test_the_kernels_on_cuda_give_values_and_gradients_of_the_reference(run):
    dtype = torch.float32 if run is efficient_attention else torch.bfloat16
    leaves = [x.requires_grad_() for x in random_inputs(4, 64, 32, dtype, "cuda")]
    packing = Packing(LENGTHS, leaves[0].device)
    found = run(*leaves, packing, scale=0.1, is_causal=True)
    expected = packed_attention_reference(*leaves, packing, scale=0.1, is_causal=True)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    pairs = zip(
        *(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)), strict=True
    )
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.1)
