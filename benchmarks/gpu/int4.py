"""INT4 experts through SGLang's kernels, beside our dequantised reference, on one GPU.

    bash benchmarks/gpu/machine.sh int4 --json [--out OUT] [--quick] [--flags "…"]

    a random model of K2.5's attention (512 + 64) ─> INT4 checkpoint ─ convert ─> bf16 checkpoint
       our network, float32 on the dequantised weights = the reference
       SGLang on the INT4 one, SGLang on the bf16 one, our network in bf16: each against it

All score the same prompts. ``mean_abs_dlogprob_sglang_int4`` is the mean difference of log-probs
between SGLang on INT4 and the reference; the same key of ``sglang_bf16`` and of ``ours_bf16`` tells
what bf16 alone does (a token that goes to another expert counts in all of them). The decoding keys
are tokens a second of 64 requests at once, INT4 and bf16.

SGLang runs its Triton kernel for 4 bits: it is there at once. Its default, Marlin, is compiled for
minutes at the first call (``--more-flags "--moe-runner-backend auto"`` takes it).
Needs a CUDA GPU, SGLang and its ``compressed_tensors`` package.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from parts import Parts  # noqa: E402 - benchmarks/gpu/parts.py

from swarm_sdk.model_backend.chat.tokenizer import Tokenizer  # noqa: E402
from swarm_sdk.model_backend.model.config import KimiConfig, k25, nano  # noqa: E402
from swarm_sdk.model_backend.model.kimi import KimiModel  # noqa: E402
from swarm_sdk.model_backend.model.mla import FullAttention  # noqa: E402
from swarm_sdk.model_backend.serving.plan import Ask, plan  # noqa: E402
from swarm_sdk.model_backend.serving.supervisor import Patience, Supervisor, Told  # noqa: E402
from swarm_sdk.model_backend.weights.checkpoint import load  # noqa: E402
from swarm_sdk.model_backend.weights.convert import convert  # noqa: E402
from swarm_sdk.model_backend.weights.servable import save_checkpoint  # noqa: E402

NANO = ROOT / "model_backend" / "nano"
FLAGS = (
    "--attention-backend triton --sampling-backend pytorch --grammar-backend none "
    "--mm-attention-backend triton_attn --moe-runner-backend triton --mem-fraction-static 0.5 "
    "--context-length 4096 --max-total-tokens 131072 --cuda-graph-bs 1 8 64"
)


def config(*, is_quick: bool) -> KimiConfig:
    """K2.5's heads and latent widths, nano's vocabulary and tower, a hidden size that is quick."""
    small = nano()
    text = dataclasses.replace(
        k25().text_config,
        vocab_size=small.text_config.vocab_size,
        hidden_size=2048,
        num_hidden_layers=3 if is_quick else 6,
        intermediate_size=4096,
        moe_intermediate_size=512,
        n_routed_experts=64 if is_quick else 384,
        num_attention_heads=16,
        q_lora_rank=512,
        max_position_embeddings=8192,
    )
    vision = dataclasses.replace(small.vision_config, text_hidden_size=2048)
    return dataclasses.replace(small, text_config=text, vision_config=vision)


def random_model(shape: KimiConfig) -> KimiModel:
    """Random weights that keep the size of what passes through them; logits differ widely."""
    with torch.device("cuda"):
        model = KimiModel(shape)
    model.init_weights(seed=0)
    model.to(torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "pos_emb" not in name:
                is_stack = "experts" in name and parameter.ndim == 3
                fan_in = parameter.shape[-1] if is_stack else parameter[0].numel()
                fan_in = 1 if "embed_tokens" in name else fan_in
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    return model.eval()


@torch.inference_mode()
def our_logprobs(model: KimiModel, prompts: list[list[int]]) -> list[list[float]]:
    """Log-prob of each token of the prompts but the first, given those before it."""
    scored = []
    for prompt in prompts:
        ids_T = torch.tensor(prompt, device="cuda")
        attention = FullAttention(model.config.text_config, [len(prompt)])
        hidden_TD = model(ids_T, torch.arange(len(prompt), device="cuda"), attention)
        logprobs_TV = model.logits(hidden_TD).float().log_softmax(-1)
        scored.append(logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0].tolist())
    return scored


def post(url: str, body: dict[str, Any]) -> Any:
    """One JSON call."""
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def ask_server(url: str, prompts: list[list[int]], num_new: int) -> tuple[list[list[float]], float]:
    """SGLang's log-probs of the prompts, and tokens a second of 64 requests at once."""
    scored = []
    for prompt in prompts:
        answer = post(
            url,
            {
                "input_ids": prompt,
                "return_logprob": True,
                "logprob_start_len": 0,
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            },
        )
        scored.append([one[0] for one in answer["meta_info"]["input_token_logprobs"]][1:])
    batch = [prompt[:64] for prompt in prompts] * 64
    sampling = {"max_new_tokens": num_new, "temperature": 0, "ignore_eos": True}
    rates = []
    for _ in range(3):  # the first compiles
        started_s = time.perf_counter()
        post(url, {"input_ids": batch[:64], "sampling_params": sampling})
        rates.append(64 * num_new / (time.perf_counter() - started_s))
    return scored, max(rates)


def with_server(ask: Ask, logs: Path, work: Callable[[str], Any], *, within_s: float) -> Any:
    """Serve a checkpoint, do ``work`` with its URL, stop."""

    def on_told(told: Told) -> None:
        print(f"{told.name} {told.kind} {told.after_s:.0f} s {told.text[:120]}", file=sys.stderr)

    async def main() -> Any:
        planned = plan(ask)
        ready = anyio.Event()
        async with anyio.create_task_group() as group:
            patience = Patience(max_restarts=0)  # a wrong flag is wrong again
            group.start_soon(Supervisor(planned, logs, on_told, patience).run, ready.set)
            with anyio.fail_after(max(1.0, within_s)):
                await ready.wait()
            done = await anyio.to_thread.run_sync(work, planned.url)
            group.cancel_scope.cancel()
        return done

    return anyio.run(main)


def differences(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    """Mean and largest difference."""
    apart = [
        abs(a - b)
        for row, same in zip(one, other, strict=True)
        for a, b in zip(row, same, strict=True)
    ]
    return statistics.fmean(apart), max(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="64 experts, 3 layers")
    parser.add_argument("--python", default=sys.executable, help="the Python that has SGLang")
    parser.add_argument("--flags", default=FLAGS, help="further flags of SGLang")
    parser.add_argument("--more-flags", default="", help="after those")
    parser.add_argument("--port", type=int, default=31000)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the whole run")
    parser.add_argument("--out", type=Path, help="int4.json, kept up, and the servers' logs")
    options = parser.parse_args()
    shape = config(is_quick=options.quick)
    settings = vars(options) | {"config": dataclasses.asdict(shape.text_config)}
    parts = Parts("int4", settings, options.out, seconds=options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        measure(parts, shape, Path(folder), options)
    parts.finish(as_json=options.json)


def measure(parts: Parts, shape: KimiConfig, work: Path, options: argparse.Namespace) -> None:
    """Write, convert, score by all, compare."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(0, 3000, (8, 256), generator=generator).tolist()
    num_new = 32 if options.quick else 128
    found = parts.results
    with parts.part("write INT4"):
        save_checkpoint(random_model(shape), Tokenizer.from_dir(NANO), work / "int4", is_int4=True)
    with parts.part("convert to bf16"):
        started_s = time.perf_counter()
        converted = convert(work / "int4", work / "bf16", "bf16")
        found["convert_s"] = time.perf_counter() - started_s
        found["convert_gb"] = converted.num_bytes / 1e9
    torch.cuda.empty_cache()
    with parts.part("reference"):
        reference = our_logprobs(load(work / "int4", device="cuda"), prompts)
        found["logprob_spread"] = statistics.pstdev([one for row in reference for one in row])
    scored: dict[str, list[list[float]]] = {}

    def keep(name: str, logprobs: list[list[float]]) -> None:
        scored[name] = logprobs
        mean, most = differences(logprobs, reference)
        found[f"mean_abs_dlogprob_{name}"], found[f"max_abs_dlogprob_{name}"] = mean, most
        parts.say(f"{name}: mean difference {mean:.4f}, largest {most:.4f}")

    with parts.part("ours in bf16"):
        in_bf16 = load(work / "int4", dtype=torch.bfloat16, device="cuda")
        keep("ours_bf16", our_logprobs(in_bf16, prompts))
        del in_bf16
    torch.cuda.empty_cache()
    for form in ("int4", "bf16"):
        if not parts.has_time(f"SGLang on {form}", 45):
            continue
        with parts.part(f"SGLang on {form}"):
            ask = Ask(
                folder=work / form,
                port=options.port,
                python=options.python,
                context_tokens=4096,
                extra=shlex.split(f"{options.flags} {options.more_flags}"),
            )
            logprobs, rate = with_server(
                ask,
                (options.out or work) / f"logs-{form}",
                lambda url: ask_server(url, prompts, num_new),
                within_s=parts.left_s,
            )
            keep(f"sglang_{form}", logprobs)
            found[f"decode_tokens_per_s_{form}"] = rate
    if {"sglang_int4", "sglang_bf16"} <= scored.keys():
        mean, _ = differences(scored["sglang_int4"], scored["sglang_bf16"])
        found["mean_abs_dlogprob_sglang_int4_vs_bf16"] = mean


if __name__ == "__main__":
    main()
