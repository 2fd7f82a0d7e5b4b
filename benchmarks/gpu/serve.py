"""Serving through SGLang's production kernels: `nano`, and K2.5's true layer shapes.

    bash benchmarks/gpu/machine.sh serve --json > serve-h200.json
    python benchmarks/gpu/serve.py --device cpu --mini          in miniature: proves the way

    64 sub-agents, one prefix of 2,000 tokens, 32 of their own ─> our client ─┐
                                      the same ─> SGLang's own bench client  ─┴─> a ratio

Keys, by model (large: 1 dense layer and 1 of 384 experts, random; nano): cached_fraction (of the
prompt tokens of the 64), tokens_per_s, bench_tokens_per_s (SGLang's client, log-probabilities asked
for as ours does), bench_plain_tokens_per_s (without), throughput_over_sglang_bench, ready_s; for
nano also what benchmarks/sglang_server.py tells of an episode. What failed is told in `failures`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import anyio

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

import sglang_server  # noqa: E402 - benchmarks/sglang_server.py
from parts import Parts  # noqa: E402 - benchmarks/gpu/parts.py
from server import (  # noqa: E402
    CPU_ENVIRONMENT,
    RandomWeights,
    Server,
    python_of_server,
    true_shapes,
    write_config,
    write_nano,
)

from swarm_sdk.config import nano_directory  # noqa: E402
from swarm_sdk.desk import atlas_corpus  # noqa: E402
from swarm_sdk.model_backend.sglang_client import SglangEngine, open_sglang  # noqa: E402
from swarm_sdk.model_backend.sglang_weights import SglangWeights  # noqa: E402
from swarm_sdk.model_backend.weights import checkpoint  # noqa: E402
from swarm_sdk.tools.search import OpenTool, SearchTool  # noqa: E402
from swarm_sdk.types import Sampling  # noqa: E402

OWN_TOKENS = 32
MIN_REPETITION_S = 20.0
LOWEST_ID, HIGHEST_ID = 300, 3_000
"""Ids of ordinary tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", default="large,nano")
    parser.add_argument("--agents", type=int, default=64)
    parser.add_argument("--prefix-tokens", type=int, default=2_000)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the whole run")
    parser.add_argument("--moe-configs", type=Path, help="folder of tuned ones (fused_moe.py)")
    parser.add_argument("--out", type=Path, help="serve.json, kept up, and the servers' logs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mini", action="store_true", help="nano only, a few requests")
    options = parser.parse_args()
    if options.mini:
        options.models, options.agents, options.repetitions = "nano", 4, 1
        options.prefix_tokens, options.max_tokens = 400, 8
    if options.moe_configs:
        os.environ["SGLANG_MOE_CONFIG_DIR"] = str(options.moe_configs.resolve())
    parts = Parts("serve", vars(options), options.out, seconds=options.seconds, summary=worst)
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.out or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        for name in options.models.split(","):
            if parts.has_time(name, 60):
                with parts.part(name):
                    anyio.run(measure, parts, name, Path(scratch), logs, options)
    parts.finish(as_json=options.json)


def worst(results: dict[str, Any]) -> dict[str, float]:
    """The least of all models."""
    found = {}
    for key in ("cached_fraction", "throughput_over_sglang_bench"):
        known = [one[key] for one in results.values() if key in one]
        if known:
            found[key] = min(known)
    return found


async def measure(
    parts: Parts, name: str, scratch: Path, logs: Path, options: argparse.Namespace
) -> None:
    """One model on one server."""
    folder = scratch / name
    flags = ["--context-length", "8192", "--max-running-requests", "256"]
    if name == "nano":
        write_nano(folder)
    else:
        config = true_shapes(num_layers=2)
        write_config(folder, config)
        flags += ["--load-format", "dummy"]
    if options.device == "cuda":
        flags += ["--mem-fraction-static", "0.75", "--cuda-graph-bs", "1", "8", "32", "64", "128"]
    else:
        flags = []
    server = Server(
        folder,
        logs / f"{name}.log",
        device=options.device,
        flags=flags,
        ready_within_s=min(300.0, parts.left_s),
    )
    figures: dict[str, Any] = {}
    parts.results[name] = figures
    async with _entered(server):
        figures["ready_s"] = server.ready_s
        if name != "nano":  # dummies would send every token to the same experts
            with parts.part(f"{name}: weights"):
                weights = RandomWeights(config, options.device)
                sink = SglangWeights(server.url, config, parameters=list(weights))
                await sink.update_weights(weights, 1)
                await sink.aclose()
                del weights
        with parts.part(f"{name}: shared prefix"):
            figures |= await shared_prefix(server.url, folder, options, parts)
        if name == "nano":
            served = open_sglang(server.url, nano_directory())
            assert isinstance(served.engine, SglangEngine)
            with parts.part("nano: episode"):
                model = checkpoint.load(nano_directory())
                corpus = atlas_corpus()
                figures["episode"] = await sglang_server.episode(
                    served,
                    [SearchTool(corpus), OpenTool(corpus)],
                    scratch / "runs",
                    model,
                    quick=True,
                )
            with parts.part("nano: cancel"):
                figures |= await sglang_server.cancelling(server.url, served.engine)
            await served.engine.aclose()


class _entered:  # noqa: N801 - used as a function
    """A blocking context manager from async code."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __aenter__(self) -> Server:
        return await anyio.to_thread.run_sync(self._server.__enter__)

    async def __aexit__(self, *failure: Any) -> None:
        await anyio.to_thread.run_sync(self._server.__exit__, *failure)


async def shared_prefix(
    url: str, folder: Path, options: argparse.Namespace, parts: Parts
) -> dict[str, Any]:
    """Our client and SGLang's on the same load, in turns."""
    draw = random.Random(0)

    def ids(num: int) -> list[int]:
        return [draw.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(num)]

    prefix = ids(options.prefix_tokens)
    engine = open_sglang(url, folder, records_experts=False).engine
    assert isinstance(engine, SglangEngine)
    sampling = Sampling(temperature=0, max_tokens=options.max_tokens)
    bench = subprocess.Popen(  # noqa: ASYNC220 - it starts at once and is asked from a thread
        [python_of_server(options.device), str(ROOT / "benchmarks" / "gpu" / "bench_client.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | (CPU_ENVIRONMENT if options.device == "cpu" else {}),
        cwd=folder,  # not where a module of this repository could pass for SGLang's
    )
    rates: dict[str, list[float]] = {"ours": [], "bench": [], "bench_plain": []}
    cached: list[float] = []

    async def ours(prompts: list[list[int]]) -> float:
        generations = []

        async def one(prompt: list[int]) -> None:
            generations.append(await engine.generate(prompt, sampling))

        began_s = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for prompt in prompts:
                tasks.start_soon(one, prompt)
        seconds = time.perf_counter() - began_s
        total = sum(one.num_prompt_tokens for one in generations)
        cached.append(sum(one.num_cached_tokens for one in generations) / total)
        return sum(one.num_completion_tokens for one in generations) / seconds

    def theirs(prompts: list[list[int]], *, logprobs: bool) -> float:
        assert bench.stdin is not None
        assert bench.stdout is not None
        job = {
            "url": url,
            "prompts": prompts,
            "max_tokens": options.max_tokens,
            "logprobs": logprobs,
        }
        bench.stdin.write(json.dumps(job) + "\n")
        bench.stdin.flush()
        for line in bench.stdout:
            if line.startswith("RESULT "):
                answer = json.loads(line.removeprefix("RESULT "))
                return float(answer["tokens"] / answer["seconds"])
        raise RuntimeError("SGLang's bench client ended without a result")

    try:
        for repetition in range(options.repetitions + 1):  # the first compiles and fills the cache
            if repetition > 1 and parts.left_s < MIN_REPETITION_S:
                break
            for kind, rate in rates.items():
                prompts = [prefix + ids(OWN_TOKENS) for _ in range(options.agents)]
                if kind == "ours":
                    found = await ours(prompts)
                else:
                    found = await anyio.to_thread.run_sync(
                        lambda kind=kind, prompts=prompts: theirs(prompts, logprobs=kind == "bench")
                    )
                parts.say(f"{repetition} {kind}: {found:.0f} tokens/s")
                if repetition:
                    rate.append(found)
    finally:
        bench.kill()
        bench.wait()
        await engine.aclose()
    medians = {kind: statistics.median(rate) for kind, rate in rates.items()}
    return {
        "cached_fraction": statistics.median(cached[1:]),
        "tokens_per_s": medians["ours"],
        "bench_tokens_per_s": medians["bench"],
        "bench_plain_tokens_per_s": medians["bench_plain"],
        "throughput_over_sglang_bench": medians["ours"] / medians["bench"],
        "rates": rates,
        "server_version": version_of(url),
    }


def version_of(url: str) -> Any:
    """What the server calls itself."""
    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as answer:
        return json.loads(answer.read())["version"]


if __name__ == "__main__":
    main()
