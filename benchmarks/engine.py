"""Compare the embedded engine's decoding with `transformers` on the same weights.

    python benchmarks/engine.py [--json] [--quick]

Keys: decode_ratio_b32 and decode_ratio_b1 (tokens a second over transformers' generate with its
default experts, greedy, float32, the same prompts, same run), decode_ratio_b32_NAME (over the same
with its experts implementation NAME), tokens_per_s_*, floor_tokens_per_s_b32 (what reading the
packed weights and the keys of a step once would allow at the memory's measured speed) and
floor_share_b32 (ours over it; above 1 where caches hold a part), shared_prefix_computed_once (1
if 32 sequences with one 1,000-token prefix put it through the network once).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import anyio
import torch
from report import report  # benchmarks/report.py

from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.engine.decode import DecodeNetwork
from swarm_sdk.model_backend.engine.engine import EmbeddedEngine
from swarm_sdk.model_backend.engine.pages import bytes_per_token
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights.checkpoint import load, save
from swarm_sdk.types import Sampling

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
    repeats, num_new = (1, 16) if options.quick else (3, 128)
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
        ours, theirs = [], []
        for _ in range(repeats):
            # Decoding alone: what 1 token takes, prompt included, is subtracted on both sides.
            seconds = [anyio.run(_decode_ours, model, prompts, n) for n in (1, num_new + 1)]
            ours.append(batch * num_new / (seconds[1] - seconds[0]))
            seconds = [_decode_theirs(peer, prompts, n) for n in (1, num_new + 1)]
            theirs.append(batch * num_new / (seconds[1] - seconds[0]))
            sys.stderr.write(f"batch {batch}: {ours[-1]:.0f} and {theirs[-1]:.0f} tokens/s\n")
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        results[f"decode_ratio_b{batch}"] = round(statistics.median(ratios), 2)
        results[f"decode_ratio_b{batch}_spread"] = round(max(ratios) - min(ratios), 2)
        results[f"tokens_per_s_b{batch}"] = round(statistics.median(ours), 1)
        peers[f"transformers_tokens_per_s_b{batch}"] = round(statistics.median(theirs), 1)
    for name, other in others.items():
        seconds = [_decode_theirs(other, prompts, n) for n in (1, num_new + 1)]
        theirs_per_s = batch * num_new / (seconds[1] - seconds[0])
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
        "repeats": repeats,
        "prefill": "subtracted on both sides",
        "experts_of_decode_ratio": default_experts,
    }
    report("engine", settings, results, peers, as_json=options.as_json)


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
    """Seconds from the requests to the last token; the engine is fresh, so nothing is cached."""
    engine = EmbeddedEngine(model, max_running=max(32, len(prompts)))
    sampling = Sampling(temperature=0.0, max_tokens=num_new)
    await engine.generate([1, 2, 3], Sampling(temperature=0.0, max_tokens=2))
    started_s = time.perf_counter()
    async with anyio.create_task_group() as group:
        for prompt in prompts:
            group.start_soon(engine.generate, prompt, sampling)
    seconds = time.perf_counter() - started_s
    await engine.aclose()
    return seconds


@torch.inference_mode()
def _decode_theirs(peer: torch.nn.Module, prompts: list[list[int]], num_new: int) -> float:
    ids = torch.tensor(prompts)
    started_s = time.perf_counter()
    out = peer.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
    )
    assert out.shape[1] == ids.shape[1] + num_new
    return time.perf_counter() - started_s


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
