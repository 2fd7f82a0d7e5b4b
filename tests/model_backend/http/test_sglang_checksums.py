"""Hashes as SGLang 0.5.23 tells them.

What its kernel gave was computed once, on a CPU by Triton's interpreter.
"""

import pytest
import torch

from swarm_sdk.model_backend import sglang_checksums
from swarm_sdk.model_backend.sglang_checksums import checksum

KERNEL_GAVE = {
    1: "ce91151c0e9d330e",
    3: "0fc20276d734a653",
    8: "5df3d3f4a8d8eda0",
    16384: "3304cc6cd8dd0e81",
    16385: "6bdbbcd4b7e85617",
    40001: "d1d37e187bd29efa",
}


def numbers(count):
    return torch.arange(count, dtype=torch.float32).mul(0.37).sub(3).to(torch.bfloat16)


@pytest.mark.parametrize("chunk_words", [8192, sglang_checksums.CHUNK_WORDS])
@pytest.mark.parametrize("count", KERNEL_GAVE)
def test_the_hash_of_a_server_on_a_gpu_is_that_of_its_kernel(monkeypatch, count, chunk_words):
    monkeypatch.setattr(sglang_checksums, "CHUNK_WORDS", chunk_words)
    assert checksum(numbers(count), on_gpu=True) == KERNEL_GAVE[count]
    assert checksum(numbers(count + 1)[:count], on_gpu=True) == KERNEL_GAVE[count]
    joined = torch.cat([numbers(1), numbers(count)])  # begins at no multiple of 4 bytes
    assert checksum(joined[1:], on_gpu=True) == KERNEL_GAVE[count]


def test_float32_and_matrices_hash_by_their_bytes():
    numbers = torch.arange(1000, dtype=torch.float32).mul(-0.37)
    assert checksum(numbers.reshape(40, 25), on_gpu=True) == "e0c8c6793659ba44"
    assert checksum(torch.empty(0), on_gpu=True) == "0" * 16


def test_the_hash_of_a_server_on_a_cpu_is_sha_256_cut_to_8_bytes():
    assert checksum(torch.tensor([97, 98, 99], dtype=torch.uint8)) == "ba7816bf8f01cfea"
