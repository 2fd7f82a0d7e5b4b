"""The trainer's log-probabilities beside those that SGLang sampled with, and routing replayed.

    bash benchmarks/gpu/machine.sh agreement --json > agreement-h200.json
    python benchmarks/gpu/agreement.py --device cpu --mini          proves the way

    SGLang samples, and records which experts it chose ─> the same tokens through our model in one
    pass: with its own routing (plain), and with the recorded one (replayed)

Keys, by model (random: 384 experts, random weights, where ties abound; nano: trained) and by the
trainer's precision (float32, bfloat16; the weights are the same bfloat16): plain, replayed (mean
|difference|), max_plain, max_replayed, flipped (share of (token, layer) pairs with other experts in
our model).
pictures (as plain, of tokens sampled after a picture that each of the two has encoded).
mean_abs_dlogprob_plain and mean_abs_dlogprob_replayed are those of `random` in float32.
A sampled media placeholder reads as id 0 in our model and in transformers, and as its own row in
SGLang: a sequence ends there.
tokens_per_s, tokens_per_s_recorded: without and with experts asked for, all calls at once; medians
of three rounds in turns, after one that compiles.
With --exact SGLang runs our model class (residual stream, router and output matrix in float32).
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch
from PIL import Image as Pillow

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from parts import Parts  # noqa: E402 - benchmarks/gpu/parts.py
from server import EXACT, Server, middle, write_checkpoint, write_nano  # noqa: E402

from swarm_sdk.config import nano_directory  # noqa: E402
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer  # noqa: E402
from swarm_sdk.model_backend.model.config import KimiConfig  # noqa: E402
from swarm_sdk.model_backend.model.kimi import KimiModel  # noqa: E402
from swarm_sdk.model_backend.model.media import (  # noqa: E402
    MediaBatch,
    MediaItem,
    decode_image,
    preprocess_image,
)
from swarm_sdk.model_backend.model.mla import FullAttention  # noqa: E402
from swarm_sdk.model_backend.sglang_client import SglangEngine, open_sglang  # noqa: E402
from swarm_sdk.model_backend.weights import checkpoint  # noqa: E402
from swarm_sdk.types import Generation, Image, Sampling  # noqa: E402

ROUNDS = 4
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", default="random,nano")
    parser.add_argument("--calls", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--server-flags", default="", help="as --enable-deterministic-inference")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the whole run")
    parser.add_argument("--exact", action="store_true", help="our model class in SGLang")
    parser.add_argument("--out", type=Path, help="agreement.json, kept up, and the servers' logs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mini", action="store_true", help="nano only, a few calls")
    options = parser.parse_args()
    if options.mini:
        options.models, options.calls, options.max_tokens = "nano", 4, 12
    parts = Parts(
        "agreement", vars(options), options.out, seconds=options.seconds, summary=of_the_first
    )
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.out or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        for name in options.models.split(","):
            if parts.has_time(name, 45):
                with parts.part(name):
                    measure(parts, name, Path(scratch) / name, logs, options)
    parts.finish(as_json=options.json)


def of_the_first(results: dict[str, Any]) -> dict[str, Any]:
    """Of the random model where it ran."""
    best = results.get("random", results.get("nano", {})).get("float32", {})
    return {f"mean_abs_dlogprob_{key}": best.get(key) for key in ("plain", "replayed")}


def measure(parts: Parts, name: str, folder: Path, logs: Path, options: argparse.Namespace) -> None:
    """One model: sampled by SGLang, scored by ours."""
    figures: dict[str, Any] = {}
    parts.results[name] = figures
    if name == "nano":
        write_nano(folder)
    else:
        write_checkpoint(folder, middle(), options.device)
    flags = options.server_flags.split()
    if options.exact:
        flags.append("--enable-fp32-lm-head")
    if options.device == "cuda":
        flags += ["--mem-fraction-static", "0.5", "--context-length", "8192"]
        flags += ["--cuda-graph-bs", "1", "8", "32", "--max-running-requests", "256"]
    server = Server(
        folder,
        logs / f"agreement-{name}.log",
        device=options.device,
        flags=flags,
        ready_within_s=min(300.0, parts.left_s),
        models=EXACT if options.exact else "",
    )
    sampled: list[tuple[tuple[int, ...], Generation]] = []
    seen: list[tuple[tuple[int, ...], Generation, MediaItem]] = []
    with server:
        with parts.part(f"{name}: sampling"):
            sampled, rates = anyio.run(sample, server.url, folder, options)
            figures |= rates
        with parts.part(f"{name}: sampling after pictures"):
            seen = anyio.run(look, server.url, folder, options)
    source = nano_directory() if name == "nano" else folder
    for precision, dtype in PRECISIONS.items():
        with parts.part(f"{name}: {precision}"):
            model = checkpoint.load(source, dtype=dtype, device=options.device)
            figures[precision] = compare(model, sampled) if sampled else {}
            parts.say(str(figures[precision]))
            if seen:
                figures[precision] |= compare_pictures(model, seen)
            del model


async def sample(
    url: str, folder: Path, options: argparse.Namespace
) -> tuple[list[tuple[tuple[int, ...], Generation]], dict[str, Any]]:
    """Calls side by side, with and without experts; those with are kept."""
    engine = open_sglang(url, folder).engine
    assert isinstance(engine, SglangEngine)
    draw = random.Random(0)
    rates: dict[str, list[float]] = {"tokens_per_s": [], "tokens_per_s_recorded": []}
    kept: list[tuple[tuple[int, ...], Generation]] = []
    for kind, experts_from in (("tokens_per_s", None), ("tokens_per_s_recorded", 0)) * ROUNDS:
        prompts = [
            tuple(draw.randrange(300, 3_000) for _ in range(options.prompt_tokens))
            for _ in range(options.calls)
        ]
        kept.clear()

        async def one(prompt: tuple[int, ...], experts_from: int | None) -> None:
            sampling = Sampling(max_tokens=options.max_tokens, experts_from=experts_from)
            kept.append((prompt, await engine.generate(prompt, sampling)))

        began_s = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for prompt in prompts:
                tasks.start_soon(one, prompt, experts_from)
        seconds = time.perf_counter() - began_s
        rates[kind].append(sum(len(generation.token_ids) for _, generation in kept) / seconds)
    await engine.aclose()
    return list(kept), {kind: statistics.median(rate[1:]) for kind, rate in rates.items()}


async def look(
    url: str, folder: Path, options: argparse.Namespace
) -> list[tuple[tuple[int, ...], Generation, MediaItem]]:
    """Calls with a picture each."""
    engine = open_sglang(url, folder).engine
    assert isinstance(engine, SglangEngine)
    tokenizer = Tokenizer.from_dir(folder)
    special, pixels = tokenizer.special, np.random.default_rng(1)
    # SGLang 0.5.11 spells the ids of a prompt with pictures and reads them again: no random ones.
    before, after = (tokenizer.encode(text) for text in ("Look at the picture.", "What is in it?"))
    found = []
    for width, height in ((224, 160), (75, 300)):
        encoded = io.BytesIO()
        shape = (height, width, 3)
        Pillow.fromarray(pixels.integers(0, 256, shape, dtype=np.uint8)).save(encoded, "PNG")
        picture = Image(encoded.getvalue())
        item = preprocess_image(decode_image(picture.data))
        pads = [special.media_pad] * item.num_tokens
        prompt = (*before, special.media_begin, *pads, special.media_end, *after)
        sampling = Sampling(max_tokens=options.max_tokens)
        generation = await engine.generate(prompt, sampling, [picture])
        if generation.num_prompt_tokens != len(prompt):
            raise RuntimeError(f"{generation.num_prompt_tokens} ids were read of {len(prompt)}")
        found.append((prompt, generation, item))
    await engine.aclose()
    return found


@torch.inference_mode()
def compare_pictures(
    model: KimiModel, seen: list[tuple[tuple[int, ...], Generation, MediaItem]]
) -> dict[str, float]:
    """Mean difference of the tokens sampled after a picture, with our own routing."""
    device = model.embed_tokens.weight.device
    differences = []
    for prompt, generation, item in seen:
        sampled_ids = generation.token_ids
        if model.config.media_placeholder_token_id in sampled_ids:
            continue  # more placeholders than pictures
        ids = torch.tensor([*prompt, *sampled_ids], device=device)
        mine = logprobs(model, ids, len(prompt), media=MediaBatch.of([item]))
        differences.append((torch.tensor(generation.logprobs, device=device) - mine).abs())
    return {"pictures": float(torch.cat(differences).mean())}


@torch.inference_mode()
def compare(
    model: KimiModel, sampled: list[tuple[tuple[int, ...], Generation]]
) -> dict[str, float]:
    """Differences of all sampled tokens, with our routing and with the recorded one."""
    text = model.config.text_config
    device = model.embed_tokens.weight.device
    plain: list[torch.Tensor] = []
    replayed: list[torch.Tensor] = []
    flipped: list[torch.Tensor] = []
    for prompt, generation in sampled:
        experts = generation.routed_experts
        if experts is None:
            raise RuntimeError("the server records no experts: --enable-return-routed-experts")
        sampled_ids = until_placeholder(generation.token_ids, model.config)
        ids = torch.tensor([*prompt, *sampled_ids], device=device)
        told = torch.frombuffer(bytearray(experts.data), dtype=torch.uint16).to(torch.int64)
        told = told.reshape(-1, experts.num_layers, experts.num_chosen)
        told = told[: len(ids) - 1, text.first_k_dense_replace :].to(device)
        # The last id predicts nothing, so it need not run.
        chosen: list[torch.Tensor] = []
        mine = logprobs(model, ids, len(prompt), chosen=chosen)
        theirs = logprobs(model, ids, len(prompt), replayed=told.unbind(1))
        recorded = torch.tensor(generation.logprobs[: len(sampled_ids)], device=device)
        plain.append((recorded - mine).abs())
        replayed.append((recorded - theirs).abs())
        own = torch.stack(chosen, dim=1)
        flipped.append((own.sort(-1).values != told.sort(-1).values).any(-1).float().flatten())
    return {
        "tokens": sum(len(one) for one in plain),
        "plain": float(torch.cat(plain).mean()),
        "replayed": float(torch.cat(replayed).mean()),
        "max_plain": float(torch.cat(plain).max()),
        "max_replayed": float(torch.cat(replayed).max()),
        "flipped": float(torch.cat(flipped).mean()),
    }


def until_placeholder(token_ids: Sequence[int], config: KimiConfig) -> Sequence[int]:
    """The ids up to the first media placeholder, and it."""
    for place, token_id in enumerate(token_ids):
        if token_id == config.media_placeholder_token_id:
            return token_ids[: place + 1]
    return token_ids


def logprobs(
    model: KimiModel,
    ids: torch.Tensor,
    num_prompt: int,
    *,
    chosen: list[torch.Tensor] | None = None,
    replayed: Sequence[torch.Tensor] | None = None,
    media: MediaBatch | None = None,
) -> torch.Tensor:
    """Log-probabilities of the sampled ids, in one pass over all but the last."""
    read = ids[:-1]
    attention = FullAttention(model.config.text_config, [len(read)])
    positions = torch.arange(len(read), device=ids.device)
    hidden = model(read, positions, attention, media, chosen, replayed)
    logits = model.logits(hidden[num_prompt - 1 :])
    return logits.log_softmax(-1).gather(1, ids[num_prompt:, None]).squeeze(1)


if __name__ == "__main__":
    main()
