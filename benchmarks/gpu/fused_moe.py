"""Configurations of SGLang's fused mixture-of-experts kernel, found by measurement on this card.

    bash benchmarks/gpu/machine.sh kernels --out OUT --only serving --only serving_int4
    SGLANG_MOE_CONFIG_DIR=OUT python -m sglang.launch_server …

SGLang reads ``$SGLANG_MOE_CONFIG_DIR/configs/triton_VERSION/E=…,N=…,device_name=….json``, a map
from numbers of tokens to tile shapes, and takes the nearest. For each number of tokens the
candidates below are timed as a CUDA graph on the same random routing; the winners are written,
loaded again by SGLang itself and timed once more: those are the figures that are kept. The INT4
kernel with tile shapes is SGLang's Triton one (``moe_wna16``); beside it stands Marlin, SGLang's
default for compressed tensors, which has no such file and is compiled for minutes at its first
call. ``python fused_moe.py`` does only that, so that it can be done beforehand.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import triton
from sglang.jit_kernel.gptq_marlin_repack import gptq_marlin_repack
from sglang.srt import server_args
from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe
from sglang.srt.layers.moe.moe_runner.triton_utils import (
    fused_moe_triton_config,
    get_config_file_name,
    override_config,
)
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts_impl
from sglang.srt.layers.quantization.marlin_utils import (
    marlin_make_workspace,
    marlin_moe_permute_scales,
)
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from kernels import Bench

EXPERTS, HIDDEN, INNER, CHOSEN = 384, 7168, 2048, 8
GROUP = 32
"""Weights that share a scale in INT4."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REPORTED = (1, 16, 256, 4096)
REPORTING_S = 30.0
"""Kept for the figures of the winners."""

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


INT4_FEW: tuple[Candidate, ...] = (
    (16, 32, 64, 1, 4, 3),
    (16, 32, 64, 1, 2, 4),
    (16, 64, 64, 1, 4, 3),
    (16, 32, 128, 1, 4, 3),
)
INT4_MANY: tuple[Candidate, ...] = (
    (64, 64, 32, 8, 4, 3),
    (64, 64, 64, 8, 4, 3),
    (64, 128, 32, 8, 4, 3),
    (128, 64, 32, 8, 4, 3),
)
"""The kernel of 4 bits takes small tiles only: it unpacks them in registers."""


def candidates(num_tokens: int, *, is_int4: bool) -> tuple[Candidate, ...]:
    """What is worth a try at about ``num_tokens * 8 / 384`` rows an expert."""
    if is_int4:
        return INT4_FEW if num_tokens <= 512 else INT4_MANY
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


class Marlin:
    """The same experts of 4 bits, laid out for SGLang's Marlin kernel."""

    def __init__(self, weights: Weights) -> None:
        self.gate_up, self.down = repacked(weights.gate_up), repacked(weights.down)
        self.scales = [
            marlin_moe_permute_scales(
                weights.more[name].transpose(1, 2).contiguous(), columns, rows, GROUP
            )
            for name, rows, columns in (
                ("w1_scale", 2 * INNER, HIDDEN),
                ("w2_scale", HIDDEN, INNER),
            )
        ]
        self.workspace = marlin_make_workspace(self.gate_up.device, max_blocks_per_sm=4)

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """SGLang's output [T, D]."""
        out: Tensor = fused_marlin_moe(
            x,
            self.gate_up,
            self.down,
            *self.scales,
            x,  # logits of the router: only their number is looked at
            weights,
            ids,
            workspace=self.workspace,
            num_bits=4,
        )
        return out


def repacked(packed: Tensor) -> Tensor:
    """Matrices [E, N, K / 2] of bytes in Marlin's layout [E, K / 16, 2 N], one by one."""
    num_experts, rows, columns = packed.shape
    out = torch.empty(
        (num_experts, columns // 8, 2 * rows), dtype=torch.int32, device=packed.device
    )
    unsorted = torch.empty(0, dtype=torch.int32, device=packed.device)
    for expert, matrix in enumerate(packed):
        of_words = matrix.view(torch.int32).T.contiguous()  # [K / 8, N]
        out[expert] = gptq_marlin_repack(of_words, unsorted, 2 * columns, rows, 4)
    return out


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
    others = () if bench.is_quick else tuple(one for one in TOKENS if one not in REPORTED)
    for num_tokens in REPORTED + others:
        if num_tokens in others and time.perf_counter() > bench.ends_s - REPORTING_S:
            bench.failures.append({"kernel": f"fused moe {label} {num_tokens}", "error": "no time"})
            continue
        scores = torch.rand(num_tokens, EXPERTS, device="cuda", generator=bench.generator)
        shares, ids = scores.topk(CHOSEN, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        x = bench.normal(num_tokens, HIDDEN)
        inputs[num_tokens] = (x, shares, ids.to(torch.int32))
        timed: dict[Candidate, float] = {}
        tried = candidates(num_tokens, is_int4=is_int4)
        for candidate in tried[-1:] if bench.is_quick else tried:
            with bench.kernel(f"fused moe {label} {num_tokens} {candidate}"):
                timed[candidate] = graph_ms(
                    bench, weights.run, inputs[num_tokens], as_config(candidate)
                )
        if timed:
            found[str(num_tokens)] = as_config(min(timed, key=lambda one: timed[one]))
    version = "triton_" + triton.__version__.replace(".", "_")
    path = folder / "configs" / version / weights.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {key: found[key] for key in sorted(found, key=int)}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bench.results[f"moe_configs_{label}"] = {"file": f"{version}/{path.name}", "configs": found}
    default_folder = str(Path(fused_moe_triton_config.__file__).parent)
    ways = {"tuned": (weights.run, str(folder)), "default": (weights.run, default_folder)}
    best = "tuned"
    if is_int4:
        with bench.kernel("repack for Marlin"):
            ways["marlin"] = (Marlin(weights).run, default_folder)
            best = "marlin"  # what `swarm serve` leaves SGLang to choose
    for num_tokens in REPORTED:
        x, shares, ids = inputs[num_tokens]
        num_hit = len(ids.unique())
        flops = num_tokens * CHOSEN * 6 * HIDDEN * INNER
        moved = num_hit * weights.bytes_per_expert + 2 * num_tokens * HIDDEN * 2
        for name, (run, place) in ways.items():
            with bench.kernel(f"fused moe {label} {num_tokens} {name}"):
                os.environ["SGLANG_MOE_CONFIG_DIR"] = place
                fused_moe_triton_config.get_moe_configs.cache_clear()
                few = slice(0, 8)
                with override_config(None):
                    out = run(x, shares, ids)
                wanted = weights.expected(x[few], shares[few], ids[few])
                error = close(out[few], wanted, 2e-2, "output")
                ms = graph_ms(bench, run, inputs[num_tokens], None)
                bench.row(
                    f"fused experts of SGLang, {label}",
                    f"{num_tokens} tokens, {num_hit} experts hit",
                    name,
                    ms,
                    flops=flops,
                    gigabytes=moved / 1e9,
                    error=error,
                )
                key = f"moe_floor_share{'_int4' if is_int4 else ''}_{num_tokens}"
                if name == best:
                    bench.results[key] = bench.rows[-1]["share"]
        bench.keep()


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


def compile_marlin() -> None:
    """One call at tiny shapes, for what it leaves in SGLang's cache of compiled kernels."""
    packed = [random_bytes(2, 256, 64), random_bytes(2, 128, 64)]
    scales = [torch.ones(2, 128 // GROUP, rows, dtype=torch.bfloat16).cuda() for rows in (256, 128)]
    x = torch.ones(1, 128, dtype=torch.bfloat16, device="cuda")
    ids = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    gate_up, down = (repacked(one) for one in packed)
    fused_marlin_moe(x, gate_up, down, *scales, x, torch.ones(1, 1).cuda(), ids, num_bits=4)
    torch.cuda.synchronize()


if __name__ == "__main__":
    started_s = time.perf_counter()
    compile_marlin()
    print(f"Marlin was compiled in {time.perf_counter() - started_s:.0f} s")
