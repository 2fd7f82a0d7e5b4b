"""Compare the embedded engine's decoding with `transformers` on the same weights.

    python benchmarks/engine.py [--json] [--quick]

Both engines take turns in one run, each over the same prompts. Decoding alone is timed, from the
step that read the last prompt to the last token, by clocks between the steps. Other load can only
make a turn longer, so a side's speed is that of its best turn, for both sides alike; what the
medians give stands beside it (``_median``).

Keys: decode_ratio_b32 and decode_ratio_b1 (tokens a second over transformers' generate with its
default experts, greedy, float32, the same prompts, same run), decode_ratio_b32_NAME (over the same
with its experts implementation NAME, one turn), tokens_per_s_*. Two bounds at batch 32, each if all
else took no time: floor_tokens_per_s_b32 (reading the packed weights and the keys of a step once,
at the memory's measured speed) and compute_floor_tokens_per_s_b32 (the multiplications and
additions of a step, at the speed of fused multiply-adds on registers, all threads), and ours over
them (floor_share_b32, compute_share_b32). shared_prefix_computed_once (1 if 32 sequences with one
1,000-token prefix put it through the network once).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import numpy as np
import torch
from report import report  # benchmarks/report.py

from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.engine.decode import DecodeNetwork
from swarm_sdk.model_backend.engine.engine import EmbeddedEngine
from swarm_sdk.model_backend.engine.pages import bytes_per_token
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights.checkpoint import load, save
from swarm_sdk.types import Sampling

if TYPE_CHECKING:
    from swarm_sdk.model_backend.engine.scheduler import Chunk
    from swarm_sdk.model_backend.model.config import TextConfig

PROMPT_TOKENS = 96
VOCABULARY = 3_800
PREFIX_TOKENS = 1_000
PREFIX_SEQUENCES = 32
EXPERTS_IMPLEMENTATIONS = ("batched_mm", "eager")
"""Of transformers, beside its default."""
READ_MB = 256
"""Far beyond every cache."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer tokens")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    turns, num_new = (1, 16) if options.quick else (5, 128)
    torch.set_num_threads(2)
    model = load(nano_directory(), dtype=torch.float32, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        peer = _load_peer(folder)
        others = {name: _load_peer(folder, name) for name in EXPERTS_IMPLEMENTATIONS}
    default_experts = str(peer.config.get_text_config()._experts_implementation)  # noqa: SLF001
    anyio.run(_decode_ours, model, _prompts(1), 4)  # compiles, where nothing is cached yet
    results: dict[str, float] = {}
    peers: dict[str, float] = {}
    for batch in (1, 32):
        prompts = _prompts(batch)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(turns):
            ours.append(anyio.run(_decode_ours, model, prompts, num_new))
            theirs.append(_decode_theirs(peer, prompts, num_new))
            sys.stderr.write(f"batch {batch}: {ours[-1]:.0f} and {theirs[-1]:.0f} tokens/s\n")
        for suffix, of in (("", max), ("_median", statistics.median)):
            results[f"decode_ratio_b{batch}{suffix}"] = round(of(ours) / of(theirs), 2)
            results[f"tokens_per_s_b{batch}{suffix}"] = round(of(ours), 1)
            peers[f"transformers_tokens_per_s_b{batch}{suffix}"] = round(of(theirs), 1)
    for name, other in others.items():
        theirs_per_s = _decode_theirs(other, prompts, num_new)
        sys.stderr.write(f"batch {batch}, transformers with {name}: {theirs_per_s:.0f} tokens/s\n")
        ratio = results["tokens_per_s_b32"] / theirs_per_s
        results[f"decode_ratio_b32_{name}"] = round(ratio, 2)
        peers[f"transformers_{name}_tokens_per_s_b32"] = round(theirs_per_s, 1)
    read_bytes_per_s = _read_bytes_per_s()
    step_bytes = _step_bytes(model, batch, PROMPT_TOKENS + num_new // 2)
    floor = batch * read_bytes_per_s / step_bytes
    results["memory_gb_per_s"] = round(read_bytes_per_s / 1e9, 2)
    results["step_mb_b32"] = round(step_bytes / 1e6, 1)
    results["floor_tokens_per_s_b32"] = round(floor, 1)
    results["floor_share_b32"] = round(results["tokens_per_s_b32"] / floor, 3)
    flops_per_s = _flops_per_s(torch.get_num_threads())
    flops = _flops_per_token(model.config.text_config, PROMPT_TOKENS + num_new // 2)
    results["fma_gflop_per_s"] = round(flops_per_s / 1e9, 1)
    results["mflop_per_token"] = round(flops / 1e6, 2)
    results["compute_floor_tokens_per_s_b32"] = round(flops_per_s / flops, 1)
    results["compute_share_b32"] = round(results["tokens_per_s_b32"] * flops / flops_per_s, 3)
    computed = anyio.run(_computed_tokens, model)
    least = PREFIX_TOKENS // 16 * 16
    results["shared_prefix_tokens_computed"] = computed
    results["shared_prefix_computed_once"] = int(computed < 2 * least)
    settings = {
        "model": "nano",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": num_new,
        "turns": turns,
        "statistic": "shortest time of each side; _median: medians",
        "prefill": "subtracted on both sides",
        "experts_of_decode_ratio": default_experts,
    }
    report("engine", settings, results, peers, as_json=options.as_json)


def _flops_per_token(text: TextConfig, num_keys: int) -> float:
    """Floating-point operations of one token's step, attention in the absorbed form."""
    hidden, heads, latent = text.hidden_size, text.num_attention_heads, text.kv_lora_rank
    nope, rope, value = text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim
    attention = hidden * (text.q_lora_rank + latent + rope)
    attention += heads * (text.q_lora_rank * (nope + rope) + latent * (nope + value))
    attention += heads * (num_keys * (2 * latent + rope) + value * hidden)
    num_experts = text.num_experts_per_tok + text.n_shared_experts
    mixture = hidden * (text.n_routed_experts + 3 * num_experts * text.moe_intermediate_size)
    num_dense = text.first_k_dense_replace
    num_mixtures = text.num_hidden_layers - num_dense
    dense = 3 * hidden * text.intermediate_size
    products = attention * text.num_hidden_layers + mixture * num_mixtures + dense * num_dense
    return 2.0 * (products + hidden * text.vocab_size)


def _flops_per_s(num_threads: int) -> float:
    """Speed of fused multiply-adds that touch registers only, on all threads at once: best of 20.

    Twelve independent sums of 8 numbers: enough to fill two units of four cycles each.
    """
    from swarm_sdk.model_backend.kernels.simd import (
        compiled,
        load,
        multiply_add_rows,
        offsets,
        store_rows,
        zeros,
    )

    @compiled
    def multiply(rounds: int, x: object, at: object) -> None:
        sums = zeros(12, 8)
        places, factor = offsets(sums, at, 0), load(x, 0, 8)
        for _ in range(rounds):
            sums = multiply_add_rows(sums, x, places, 0, factor)
        store_rows(x, places, 8, sums)

    rounds, best = 5_000_000, 0.0
    arrays = [(np.full(16, 0.5, np.float32), np.zeros(12, np.int64)) for _ in range(num_threads)]
    multiply(1, *arrays[0])
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(20):
            started_s = time.perf_counter()
            list(pool.map(lambda pair: multiply(rounds, *pair), arrays))
            seconds = time.perf_counter() - started_s
            best = max(best, num_threads * rounds * 12 * 8 * 2 / seconds)
    return best


def _read_bytes_per_s() -> float:
    """Speed of summing a large array with all threads: best of five."""
    values = torch.ones(READ_MB * 2**20 // 4)
    seconds = []
    for _ in range(5):
        started_s = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - started_s)
    return values.nbytes / min(seconds)


def _step_bytes(model: KimiModel, batch: int, num_keys: int) -> int:
    """Bytes that a step reads: packed weights, all experts, and ``num_keys`` of each sequence."""
    text = model.config.text_config
    key_bytes = bytes_per_token(text, torch.float32)
    kv = torch.zeros(text.num_hidden_layers, 16, text.kv_lora_rank + text.qk_rope_head_dim)
    network = DecodeNetwork(model, kv, page_size=16, max_rows=1)
    return network.weight_bytes + batch * num_keys * key_bytes


def _prompts(num: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(num)]


def _load_peer(folder: str, experts: str | None = None) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    chosen = {"experts_implementation": experts} if experts else {}
    peer = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **chosen)
    peer.generation_config.max_length = None
    return peer.eval()


async def _decode_ours(model: object, prompts: list[list[int]], num_new: int) -> float:
    """Tokens a second of the steps after that which read the last prompt; a fresh engine."""
    engine = EmbeddedEngine(model, max_running=max(32, len(prompts)))
    await engine.generate([1, 2, 3], Sampling(temperature=0.0, max_tokens=2))
    runner = engine._runner  # noqa: SLF001 - nothing public stands between two steps
    run, steps = runner.run, [(0.0, 0, True)]

    def run_timed(chunks: list[Chunk]) -> list[tuple[int, float]]:
        drawn = run(chunks)
        reads_prompt = any(chunk.num_tokens > 1 for chunk in chunks)
        steps.append((time.perf_counter(), len(chunks), reads_prompt))
        return drawn

    runner.run = run_timed
    sampling = Sampling(temperature=0.0, max_tokens=num_new)
    async with anyio.create_task_group() as group:
        for prompt in prompts:
            group.start_soon(engine.generate, prompt, sampling)
    await engine.aclose()
    last = max(at for at, (_, _, reads_prompt) in enumerate(steps) if reads_prompt)
    num_tokens = sum(num for _, num, _ in steps[last + 1 :])
    return num_tokens / (steps[-1][0] - steps[last][0])


class _Clock:
    """A logits processor that notes when it is called: once a step, behind the network."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return scores


@torch.inference_mode()
def _decode_theirs(peer: torch.nn.Module, prompts: list[list[int]], num_new: int) -> float:
    """Tokens a second of the steps after that which read the prompts."""
    from transformers import LogitsProcessorList

    ids, clock = torch.tensor(prompts), _Clock()
    out = peer.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        logits_processor=LogitsProcessorList([clock]),
    )
    assert out.shape[1] == ids.shape[1] + num_new
    return len(prompts) * (len(clock.times_s) - 1) / (clock.times_s[-1] - clock.times_s[0])


async def _computed_tokens(model: object) -> int:
    """Prompt tokens that went through the network for 32 prompts with one long prefix."""
    engine = EmbeddedEngine(model, max_running=PREFIX_SEQUENCES)
    draw = random.Random(1)
    prefix = [draw.randrange(VOCABULARY) for _ in range(PREFIX_TOKENS)]
    async with anyio.create_task_group() as group:
        for index in range(PREFIX_SEQUENCES):
            sampling = Sampling(temperature=0.0, max_tokens=2)
            group.start_soon(engine.generate, [*prefix, index, index + 1], sampling)
    computed = engine.num_computed_prompt_tokens
    await engine.aclose()
    return computed


if __name__ == "__main__":
    main()
