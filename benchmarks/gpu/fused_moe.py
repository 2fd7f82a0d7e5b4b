"""Configurations of SGLang's fused mixture-of-experts kernel, found by measurement on this card.

    bash benchmarks/gpu/machine.sh kernels --out OUT --only serving --only serving_int4
    SGLANG_MOE_CONFIG_DIR=OUT python -m sglang.launch_server …

SGLang reads ``$SGLANG_MOE_CONFIG_DIR/configs/triton_VERSION/E=…,N=…,device_name=….json``, a map
from numbers of tokens to tile shapes, and takes the nearest. For each number of tokens the
candidates below are timed as a CUDA graph on the same random routing; the winners are written,
loaded again by SGLang itself and timed once more: those are the figures that are kept. The INT4
kernel is SGLang's Triton one (``moe_wna16``); its default for compressed tensors is Marlin, which
has no such file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import triton
from sglang.srt import server_args
from sglang.srt.layers.moe.moe_runner.triton_utils import (
    fused_moe_triton_config,
    get_config_file_name,
    override_config,
)
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts_impl
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from kernels import Bench

EXPERTS, HIDDEN, INNER, CHOSEN = 384, 7168, 2048, 8
GROUP = 32
"""Weights that share a scale in INT4."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REPORTED = (1, 16, 256, 4096)

Candidate = tuple[int, int, int, int, int, int]
"""BLOCK_SIZE_M, N, K, GROUP_SIZE_M, warps, stages."""
FEW_ROWS: tuple[Candidate, ...] = (
    (16, 64, 128, 1, 4, 4),
    (16, 128, 128, 1, 4, 4),
    (16, 128, 128, 1, 8, 4),
    (16, 64, 256, 1, 4, 3),
)
SOME_ROWS: tuple[Candidate, ...] = (
    (16, 128, 128, 1, 4, 4),
    (32, 128, 64, 1, 4, 4),
    (64, 128, 64, 1, 4, 4),
)
MANY_ROWS: tuple[Candidate, ...] = (
    (64, 128, 64, 1, 4, 4),
    (64, 256, 64, 1, 8, 4),
    (128, 256, 64, 1, 8, 4),
    (128, 256, 64, 1, 8, 3),
)


def candidates(num_tokens: int) -> tuple[Candidate, ...]:
    """What is worth a try at about ``num_tokens * 8 / 384`` rows an expert."""
    if num_tokens <= 256:
        return FEW_ROWS
    return SOME_ROWS if num_tokens <= 1024 else MANY_ROWS


def as_config(candidate: Candidate) -> dict[str, int]:
    """In SGLang's words."""
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
    names += ("num_warps", "num_stages")
    return dict(zip(names, candidate, strict=True))


class Weights:
    """Random experts, and SGLang's function over them."""

    def __init__(self, bench: Bench, *, is_int4: bool) -> None:
        self.is_int4 = is_int4
        self.more: dict[str, Any] = {}
        sizes = ((2 * INNER, HIDDEN), (HIDDEN, INNER))
        if is_int4:
            packed = [random_bytes(EXPERTS, rows, columns // 2) for rows, columns in sizes]
            scales = [
                bench.normal(EXPERTS, rows, columns // GROUP).abs_().mul_(0.2 * columns**-0.5)
                for rows, columns in sizes
            ]
            self.gate_up, self.down = packed
            self.more = {"use_int4_w4a16": True, "block_shape": [0, GROUP]}
            self.more |= {"w1_scale": scales[0], "w2_scale": scales[1]}
        else:
            self.gate_up, self.down = (
                bench.normal(EXPERTS, rows, columns, std=columns**-0.5) for rows, columns in sizes
            )

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """SGLang's output [T, D]."""
        out: Tensor = fused_experts_impl(
            x, self.gate_up, self.down, weights, ids, filter_expert=False, **self.more
        )
        return out

    def matrix(self, which: int, expert: int) -> Tensor:
        """One expert's matrix in float32."""
        stored = (self.gate_up, self.down)[which][expert]
        if not self.is_int4:
            return stored.float()
        low, high = (stored & 15).float(), (stored >> 4).float()
        whole = torch.stack([low, high], -1).flatten(1) - 8
        scale = self.more[("w1_scale", "w2_scale")[which]][expert].float()
        return whole * scale.repeat_interleave(GROUP, dim=1)

    def expected(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The output of a few tokens, one by one in float32."""
        out = torch.zeros_like(x, dtype=torch.float32)
        for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
            for expert, share in zip(chosen, shares, strict=True):
                gate, up = (self.matrix(0, expert) @ x[token].float()).chunk(2)
                out[token] += share * (self.matrix(1, expert) @ (functional.silu(gate) * up))
        return out

    @property
    def bytes_per_expert(self) -> float:
        """What reading one expert costs."""
        weights = 3 * HIDDEN * INNER
        return weights * (0.5 + 2 / GROUP) if self.is_int4 else weights * 2.0

    @property
    def file_name(self) -> str:
        """As SGLang looks it up: N is the last size of the second matrix as stored."""
        dtype = "int4_w4a16" if self.is_int4 else None
        name: str = get_config_file_name(EXPERTS, self.down.shape[2], dtype)
        return name


def random_bytes(*shape: int) -> Tensor:
    """Random uint8, without a wider copy."""
    return torch.empty(shape, dtype=torch.uint8, device="cuda").random_(0, 256)


def tune(bench: Bench, folder: Path, *, is_int4: bool) -> None:
    """Find, write, load and time again."""
    from kernels import close

    fixed = SimpleNamespace(
        enable_deterministic_inference=False, enable_fused_moe_sum_all_reduce=False
    )
    server_args.set_global_server_args_for_scheduler(fixed)
    label = "int4" if is_int4 else "bf16"
    weights = Weights(bench, is_int4=is_int4)
    found: dict[str, dict[str, int]] = {}
    inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for num_tokens in REPORTED if bench.is_quick else TOKENS:
        scores = torch.rand(num_tokens, EXPERTS, device="cuda", generator=bench.generator)
        shares, ids = scores.topk(CHOSEN, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        x = bench.normal(num_tokens, HIDDEN)
        inputs[num_tokens] = (x, shares, ids.to(torch.int32))
        timed: dict[Candidate, float] = {}
        for candidate in candidates(num_tokens)[-1:] if bench.is_quick else candidates(num_tokens):
            with bench.kernel(f"fused moe {label} {num_tokens} {candidate}"):
                timed[candidate] = graph_ms(
                    bench, weights.run, inputs[num_tokens], as_config(candidate)
                )
        if timed:
            found[str(num_tokens)] = as_config(min(timed, key=lambda one: timed[one]))
    version = "triton_" + triton.__version__.replace(".", "_")
    path = folder / "configs" / version / weights.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bench.results[f"moe_configs_{label}"] = {"file": f"{version}/{path.name}", "configs": found}
    default_folder = str(Path(fused_moe_triton_config.__file__).parent)
    for num_tokens in REPORTED:
        x, shares, ids = inputs[num_tokens]
        num_hit = len(ids.unique())
        flops = num_tokens * CHOSEN * 6 * HIDDEN * INNER
        moved = num_hit * weights.bytes_per_expert + 2 * num_tokens * HIDDEN * 2
        for name, place in (("tuned", str(folder)), ("default", default_folder)):
            with bench.kernel(f"fused moe {label} {num_tokens} {name}"):
                os.environ["SGLANG_MOE_CONFIG_DIR"] = place
                fused_moe_triton_config.get_moe_configs.cache_clear()
                few = slice(0, 8)
                with override_config(None):
                    out = weights.run(x, shares, ids)
                wanted = weights.expected(x[few], shares[few], ids[few])
                error = close(out[few], wanted, 2e-2, "output")
                ms = graph_ms(bench, weights.run, inputs[num_tokens], None)
                bench.row(
                    f"fused experts of SGLang, {label}",
                    f"{num_tokens} tokens, {num_hit} experts hit",
                    name,
                    ms,
                    flops=flops,
                    gigabytes=moved / 1e9,
                    error=error,
                )
                if name == "tuned":
                    suffix = "_int4" if is_int4 else ""
                    bench.results[f"moe_floor_share{suffix}_{num_tokens}"] = bench.rows[-1]["share"]


def graph_ms(
    bench: Bench,
    run: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    config: dict[str, int] | None,
) -> float:
    """Milliseconds of one replay; ``None`` lets SGLang choose."""
    with override_config(config):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run(*arguments)
        return bench.ms(graph.replay, limit_s=0.1)
