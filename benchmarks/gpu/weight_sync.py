"""How long new weights take from a trainer to SGLang on the same GPU, and that they arrive.

    bash benchmarks/gpu/machine.sh weight_sync --json > weight_sync-h200.json
    bash benchmarks/gpu/machine.sh weight_sync --two-gpus --json      by NCCL, trainer on the first
    python benchmarks/gpu/weight_sync.py --device cpu --mini          proves the way

    publish A, the server keeps a snapshot ─> publish B ─> publish A (timed) ─> the server compares
    every tensor with its snapshot, and our model's log-probabilities with the server's

Keys: gigabytes, tensors (of the checkpoint), publish_s (median of `update_weights`: pause, buckets
through CUDA IPC, continue; not verified meanwhile), verify_s, verified (all tensors equal ours by
checksum or the snapshot, bit for bit, and the output was another under B), checksums_compared
(where the server tells checksums that can be compared), mean_abs_dlogprob
(server and our model on the published weights), release_s, resume_s, released_gb
(--enable-memory-saver).
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from parts import Parts  # noqa: E402 - benchmarks/gpu/parts.py
from server import (  # noqa: E402
    DUMMIES,
    Server,
    middle,
    post,
    random_model,
    true_shapes,
    write_config,
)

from swarm_sdk.model_backend.model.kimi import KimiModel  # noqa: E402
from swarm_sdk.model_backend.model.mla import FullAttention  # noqa: E402
from swarm_sdk.model_backend.sglang_client import SglangEngine, open_sglang  # noqa: E402
from swarm_sdk.model_backend.sglang_weights import SglangWeights  # noqa: E402
from swarm_sdk.model_backend.weights.names import checkpoint_tensors  # noqa: E402
from swarm_sdk.types import Sampling  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--layers", type=int, default=7, help="the first is dense")
    parser.add_argument("--experts", type=int, default=32, help="of a layer; 7 x 32 are 20 GB")
    parser.add_argument("--bucket-gib", type=float, default=1.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--two-gpus", action="store_true", help="server on the second, by NCCL")
    parser.add_argument("--mem-fraction", type=float, default=0.45)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the whole run")
    parser.add_argument("--out", type=Path, help="weight_sync.json, kept up, and the server's log")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mini", action="store_true", help="half a billion parameters")
    options = parser.parse_args()
    parts = Parts("weight_sync", vars(options), options.out, seconds=options.seconds)
    with parts.part("weight_sync"):
        anyio.run(measure, parts, options)
    parts.finish(as_json=options.json)


async def measure(parts: Parts, options: argparse.Namespace) -> None:
    on_cuda = options.device == "cuda"
    config = middle() if options.mini else true_shapes(options.layers, options.experts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_config(folder, config)
        logs = options.out or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        flags = ["--load-format", "dummy"]
        if on_cuda:
            flags += ["--mem-fraction-static", str(options.mem_fraction), "--enable-memory-saver"]
            flags += ["--cuda-graph-bs", "1", "8", "--context-length", "8192"]
        if options.two_gpus:
            flags += ["--base-gpu-id", "1"]
        server = Server(
            folder,
            logs / "weight_sync.log",
            device=options.device,
            flags=flags,
            ready_within_s=min(300.0, parts.left_s),
            models=DUMMIES if on_cuda else "",
        )
        with server:
            parts.results["ready_s"] = server.ready_s
            await publish(parts, server.url, folder, config, options)


async def publish(
    parts: Parts, url: str, folder: Path, config: Any, options: argparse.Namespace
) -> None:
    device, figures = options.device, parts.results
    model = random_model(config, device)
    weights = model.state_dict()  # the routers' biases as well: the server's are dummies
    figures["gigabytes"] = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    figures["tensors"] = sum(1 for _ in checkpoint_tensors(config))
    sink = SglangWeights(
        url,
        config,
        way="distributed" if options.two_gpus else "tensor",
        parameters=list(weights),
        bucket_bytes=int(options.bucket_gib * 2**30),
        verifies=False,  # timed by itself
    )
    if options.two_gpus:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        await sink.join("127.0.0.1", port, "nccl" if device == "cuda" else "gloo")
    with parts.part("first update"):
        await sink.update_weights(weights, 1)
    with parts.part("updates"):
        post(url, "/weights_checker", {"action": "snapshot"})
        parts.say("the server has its snapshot")
        under_a = said(url)
        times: list[float] = []
        differs = True
        for repetition in range(options.repetitions):
            flip(weights)
            await sink.update_weights(weights, 2 * repetition + 2)
            differs &= said(url) != under_a
            flip(weights)
            if device == "cuda":
                torch.cuda.synchronize()
            began_s = time.perf_counter()
            await sink.update_weights(weights, 2 * repetition + 3)
            times.append(time.perf_counter() - began_s)
            figures |= {"publish_s": statistics.median(times), "publish_all_s": times}
            parts.say(f"published in {times[-1]:.3f} s")
        began_s = time.perf_counter()
        await sink.verify(weights)
        figures["verify_s"] = time.perf_counter() - began_s
        # The server's own comparison needs a GPU.
        equal = said(url) == under_a and (sink.is_verified or compares(url))
        figures |= {"verified": bool(equal and differs), "checksums_compared": sink.is_verified}
    with parts.part("log-probabilities"):
        figures["mean_abs_dlogprob"] = await difference(url, folder, model)
    if device == "cuda" and not options.two_gpus:
        with parts.part("memory"):
            figures |= await memory(sink, weights, sink.weight_version)
    if options.two_gpus:
        await sink.leave()
    await sink.aclose()


def flip(weights: dict[str, torch.Tensor]) -> None:
    """From A to B and back, exactly."""
    with torch.no_grad():
        for tensor in weights.values():
            tensor.neg_()


def said(url: str) -> Any:
    """What the server answers, greedily."""
    request = {
        "input_ids": list(range(300, 340)),
        "sampling_params": {"temperature": 0, "max_new_tokens": 8},
        "return_logprob": True,
    }
    answer = post(url, "/generate", request)
    assert isinstance(answer, dict)
    return answer["meta_info"]["output_token_logprobs"]


def compares(url: str) -> bool:
    """Whether the server's tensors equal its snapshot."""
    try:
        answer = post(url, "/weights_checker", {"action": "compare"})
    except RuntimeError:
        return False
    return not isinstance(answer, dict) or answer.get("success", True)


@torch.inference_mode()
def ours(model: KimiModel, prompt: tuple[int, ...], sampled: tuple[int, ...]) -> torch.Tensor:
    device = model.embed_tokens.weight.device
    ids = torch.tensor([*prompt, *sampled], device=device)
    attention = FullAttention(model.config.text_config, [len(ids)])
    hidden = model(ids, torch.arange(len(ids), device=device), attention)
    logits = model.logits(hidden[len(prompt) - 1 : -1])
    chosen = torch.tensor(sampled, device=device)[:, None]
    return logits.log_softmax(-1).gather(1, chosen).squeeze(1).cpu()


async def difference(url: str, folder: Path, model: KimiModel) -> float:
    """Mean |log-probability of the server - ours|, plain: routing may flip."""
    engine = open_sglang(url, folder).engine
    assert isinstance(engine, SglangEngine)
    draw, found = random.Random(0), []
    for _ in range(4):
        prompt = tuple(draw.randrange(300, 3_000) for _ in range(48))
        generation = await engine.generate(prompt, Sampling(max_tokens=16))
        mine = ours(model, prompt, generation.token_ids)
        found.append((torch.tensor(generation.logprobs) - mine).abs())
    await engine.aclose()
    return float(torch.cat(found).mean())


async def memory(
    sink: SglangWeights, weights: dict[str, torch.Tensor], version: int
) -> dict[str, float]:
    """The server's memory given back and taken again, the weights published anew."""
    free_before = torch.cuda.mem_get_info()[0]
    began_s = time.perf_counter()
    await sink.release_memory()
    release_s = time.perf_counter() - began_s
    released = torch.cuda.mem_get_info()[0] - free_before
    began_s = time.perf_counter()
    await sink.resume_memory()
    resume_s = time.perf_counter() - began_s
    await sink.update_weights(weights, version + 1)
    return {"release_s": release_s, "resume_s": resume_s, "released_gb": released / 1e9}


if __name__ == "__main__":
    main()
