"""The kernels of training at the layer shapes of K2.5, each against its floor and the next best.

    python benchmarks/gpu/kernels.py --out OUT                     all parts, about 2 minutes
    python benchmarks/gpu/kernels.py --out OUT --only experts      one part, repeatable
    python benchmarks/gpu/kernels.py --out OUT --quick             few candidates: what fails?
    python benchmarks/gpu/kernels.py --out OUT --device cpu --mini the way in miniature, no figures
    bash benchmarks/gpu/machine.sh kernels --out OUT --only serving --only serving_int4

    ceilings ─ logprob ─ router ─ layer ─ attention ─ vision ─ experts ──> OUT/kernels.json, stdout
             └ serving ─ serving_int4: SGLang's kernel, tuned (fused_moe.py) ──> OUT/configs/

Every candidate is checked against a plain reference before it is timed. One that fails is told in
`failures` with its error, the others go on, and the exit code is 1 at the end. The file is written
anew after each part, and no part begins after --seconds.

Ceilings are measured in the same run: bf16 product 8192^3, reading and copying 2 GiB. A floor is
max(FLOPs / product, bytes / reading); a share is floor / time, of all FLOPs over the product where
a key says so: grouped_gemm_share_16k (forward, dgrad and wgrad of both products of the experts, as
the model runs them; _best: the fastest candidate of each), moe_layer_train_share_16k (router to
combine, forward and backward). moe_floor_share_N: SGLang's fused experts at N tokens, tuned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from report import commit, machine, versions  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from swarm_sdk.model_backend.kernels import attention, experts, fused, logprob, router  # noqa: E402
from swarm_sdk.model_backend.kernels.attention import Packing  # noqa: E402
from swarm_sdk.model_backend.kernels.grouped import Grouped, Mixed, Tiled, TileShape  # noqa: E402
from swarm_sdk.model_backend.kernels.tiled_attention import WIDE, Tile, Tiles  # noqa: E402

BF16 = torch.bfloat16
HIDDEN, INNER, CHOSEN, VOCABULARY = 7168, 2048, 8, 163_840
HEADS, KEY_WIDTH, VALUE_WIDTH = 64, 192, 128
MIN_MEMORY_FOR_ALL_EXPERTS = 100e9
TILE_SHAPES = (
    TileShape(128, 256, 64, 8, 3),
    TileShape(128, 256, 64, 8, 4),
    TileShape(128, 128, 64, 8, 4),
    TileShape(128, 128, 64, 4, 4),
)
ATTENTION_TILES = (  # for keys 192 and values 128 wide, beside the default
    Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 3)),
)


class Bench:
    """What is measured and where it is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = options.device
        self.is_mini = options.mini
        self.is_quick = options.quick
        self.options = options
        self.out: Path = options.out
        self.ends_s = time.perf_counter() + options.seconds
        self.ceilings: dict[str, float] = {}
        self.results: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.generator = torch.Generator(device=self.device).manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
        """Random numbers on the device."""
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x.normal_(0.0, std, generator=self.generator)

    @contextmanager
    def kernel(self, name: str) -> Iterator[None]:
        """The boundary of one kernel: what it raises is told in `failures`, and the rest runs."""
        started_s = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001
            told = f"{type(error).__name__}: {error}"
            self.failures.append({"kernel": name, "error": told[:1_000]})
            print(f"FAILED {name}: {told[:300]}", file=sys.stderr, flush=True)
            traceback.print_exc(limit=-3)
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()
            took_s = time.perf_counter() - started_s
            print(f"{name}: {took_s:.1f} s", file=sys.stderr, flush=True)

    def ms(self, run: Callable[[], Any], *, limit_s: float = 0.25) -> float:
        """Median milliseconds of a call, the L2 cache flushed before each."""
        if self.device != "cuda":
            started_s = time.perf_counter()
            run()
            return (time.perf_counter() - started_s) * 1e3
        if self.is_quick:
            limit_s /= 10
        flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        run()
        torch.cuda.synchronize()
        found: list[float] = []
        started_s = time.perf_counter()
        while len(found) < 3 or (time.perf_counter() - started_s < limit_s and len(found) < 50):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return statistics.median(found)

    def row(
        self,
        operation: str,
        shape: str,
        candidate: str,
        ms: float,
        *,
        flops: float = 0.0,
        gigabytes: float = 0.0,
        error: float | None = None,
        **more: Any,
    ) -> None:
        """Keep one figure."""
        floor_ms = 1e3 * max(
            flops / self.ceilings["product_tflops"] / 1e12,
            gigabytes / self.ceilings["read_gb_per_s"],
        )
        made = {"operation": operation, "shape": shape, "candidate": candidate, "ms": ms}
        made |= {"floor_ms": floor_ms, "share": floor_ms / ms, "error": error} | more
        if flops:
            made["tflops"] = flops / ms / 1e9
        self.rows.append(made)
        text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in made.items()})
        print(text, file=sys.stderr, flush=True)

    def keep(self) -> str:
        """Write everything so far; its text."""
        content = {
            "name": "kernels",
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "settings": {k: v for k, v in vars(self.options).items() if k != "out"},
            "ceilings": self.ceilings,
            "results": self.results,
            "rows": self.rows,
            "failures": self.failures,
        }
        text = json.dumps(content)
        (self.out / "kernels.json").write_text(text + "\n", encoding="utf-8")
        return text


def close(found: Tensor, expected: Tensor, bound: float, what: str) -> float:
    """The error of ``found``, relative to the size of what is expected; raises past the bound."""
    found, expected = found.double(), expected.double()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error <= bound:
        raise AssertionError(f"{what}: relative error {error:.2e} passes {bound:.0e}")
    return error


def measure_ceilings(bench: Bench) -> None:
    """The bounds that this card has today."""
    size = 512 if bench.is_mini else 8192
    a, b = bench.normal(size, size), bench.normal(size, size)
    ms = bench.ms(lambda: a @ b, limit_s=0.5)
    bench.ceilings["product_tflops"] = 2 * size**3 / ms / 1e9
    x = torch.zeros((1 << 22) if bench.is_mini else (2 << 30), dtype=torch.uint8).to(bench.device)
    y = torch.empty_like(x)
    ms = bench.ms(lambda: x.view(torch.int32).sum(dtype=torch.int32), limit_s=0.5)
    bench.ceilings["read_gb_per_s"] = x.numel() / ms / 1e6
    ms = bench.ms(lambda: y.copy_(x), limit_s=0.5)
    bench.ceilings["copy_gb_per_s"] = 2 * x.numel() / ms / 1e6


# -- log-probs --------------------------------------------------------------------------------


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """4,096 rows of logits at a time, made again in the backward pass."""

    def of_rows(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = functional.linear(hidden, weight).float()
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    parts = [
        checkpoint(of_rows, rows, of, use_reentrant=False)
        for rows, of in zip(hidden.split(4096), targets.split(4096), strict=True)
    ]
    return torch.cat(parts)


def our_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours."""
    return logprob.linear_logprobs(hidden, weight, targets).logprobs_X


def our_logprobs_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours, both outputs in one."""
    found = logprob.linear_logprobs(hidden, weight, targets, with_entropy=True)
    assert found.entropy_X is not None
    return found.logprobs_X + 0.01 * found.entropy_X


def measure_logprob(bench: Bench) -> None:
    """Forward and backward; the floor is that of 4 products, one of them made twice."""
    candidates = {"ours": our_logprobs, "ours, with entropy": our_logprobs_and_entropy}
    candidates["checkpoint"] = plain_logprobs
    shapes = [(8192, HIDDEN, VOCABULARY), (16_384, 256, 4096)]
    for sizes_of in [(64, 32, 512)] if bench.is_mini else shapes:
        for name, run in candidates.items():
            with bench.kernel(f"logprob {sizes_of} {name}"):
                measure_logprobs(bench, sizes_of, name, run)


def measure_logprobs(
    bench: Bench, sizes_of: tuple[int, int, int], name: str, run: Callable[..., Tensor]
) -> None:
    """One candidate: checked on some rows, then timed."""
    num_rows, width, words = sizes_of
    hidden = bench.normal(num_rows, width).requires_grad_()
    weight = bench.normal(words, width, std=2 * width**-0.5).requires_grad_()
    targets = torch.randint(words, (num_rows,), device=bench.device)
    direction = bench.normal(num_rows, dtype=torch.float32)
    few = slice(0, 128)
    exact = [hidden.detach()[few].double(), weight.detach().double()]
    exact = [one.requires_grad_() for one in exact]
    wanted = logprob.linear_logprobs_reference(*exact, targets[few])
    total = wanted.logprobs_X
    if run is our_logprobs_and_entropy:
        assert wanted.entropy_X is not None
        total = total + 0.01 * wanted.entropy_X
    found = run(hidden[few], weight, targets[few])
    error = close(found, total, 1e-2, "log-probs")
    pairs = zip(
        torch.autograd.grad(found.sum(), (hidden, weight)),
        torch.autograd.grad(total.sum(), exact),
        strict=True,
    )
    for ours, plain in pairs:
        close(ours[: len(plain)], plain, 2e-2, "gradient")
    del exact, wanted, total, found, pairs, ours, plain

    def step() -> None:
        total = (run(hidden, weight, targets) * direction).sum()
        torch.autograd.grad(total, (hidden, weight))

    before_gb = peak_gb(bench, reset=True)
    ms = bench.ms(step)
    bench.row(
        "log-probs, forward and backward",
        f"{num_rows} x {width}, vocabulary {words}",
        name,
        ms,
        flops=4 * 2 * num_rows * width * words,
        error=error,
        extra_gb=peak_gb(bench) - before_gb,
    )


def peak_gb(bench: Bench, *, reset: bool = False) -> float:
    """Largest memory since the last reset, in GB."""
    if bench.device != "cuda":
        return 0.0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    return torch.cuda.max_memory_allocated() / 1e9


# -- the mixture ------------------------------------------------------------------------------


def sizes(bench: Bench) -> tuple[int, int, int, int]:
    """Experts, hidden, inner, and tokens for 1/384 of the choices of 16,384 tokens an expert."""
    if bench.is_mini:
        return 4, 64, 32, 128
    memory = torch.cuda.get_device_properties(0).total_memory
    num_experts = 384 if memory > MIN_MEMORY_FOR_ALL_EXPERTS else 192
    if bench.is_quick:
        num_experts = 64
    return num_experts, HIDDEN, INNER, 16_384 * num_experts // 384


def chosen(bench: Bench, num_tokens: int, num_experts: int) -> Tensor:
    """Random experts of each token, int64."""
    scores = torch.rand(num_tokens, num_experts, device=bench.device, generator=bench.generator)
    return scores.topk(min(CHOSEN, num_experts // 2), dim=-1).indices


def measure_router(bench: Bench) -> None:
    """Router alone, forward and backward."""
    num_tokens, width, num_experts = (64, 32, 16) if bench.is_mini else (16_384, HIDDEN, 384)
    x = bench.normal(num_tokens, width).requires_grad_()
    weight = bench.normal(num_experts, width, std=width**-0.5).requires_grad_()
    bias = bench.normal(num_experts, std=0.01, dtype=torch.float32)
    direction = torch.rand(num_tokens, CHOSEN, device=bench.device)
    exact = [x.detach()[:64].double(), weight.detach().double(), bias.double()]

    def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return router.route_reference(x.float(), weight.float(), bias, CHOSEN, 2.827)

    def ours(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return router.route(x, weight, bias, CHOSEN, 2.827)

    for name, run in {"ours": ours, "plain, float32": plain}.items():
        with bench.kernel(f"router {name}"):
            ids, weights = run(x[:64], weight)
            wanted = router.route_reference(*exact, CHOSEN, 2.827)
            whole = [
                torch.zeros(64, num_experts, device=bench.device, dtype=torch.float64).scatter(
                    1, i, w.double()
                )
                for i, w in ((ids, weights), wanted)
            ]
            error = close(*whole, 2e-2, "weights of the chosen experts")

            def step(run: Callable[..., tuple[Tensor, Tensor]] = run) -> None:
                torch.autograd.grad((run(x, weight)[1] * direction).sum(), (x, weight))

            flops = 3 * 2 * num_tokens * width * num_experts
            gigabytes = 4 * num_tokens * width * 2 / 1e9
            shape = f"{num_tokens} x {width}, {num_experts} experts"
            bench.row(
                "router, forward and backward",
                shape,
                name,
                bench.ms(step),
                flops=flops,
                gigabytes=gigabytes,
                error=error,
            )


def check_experts(bench: Bench) -> None:
    """Small mixtures with idle experts and with one for all, both dtypes, against float64."""
    for dtype, bound in ((torch.float32, 1e-4), (BF16, 3e-2)):
        for case in ("idle experts", "one for all"):
            with bench.kernel(f"experts check {dtype} {case}"):
                num_tokens, num_experts, width, inner = 96, 8, 128, 64
                ids = chosen(bench, num_tokens, num_experts).clamp(max=num_experts - 3)[:, :1]
                if case == "one for all":
                    ids = torch.full_like(ids, 3)
                made = (
                    bench.normal(num_tokens, width, dtype=dtype),
                    bench.normal(num_tokens, 1, dtype=torch.float32),
                    bench.normal(num_experts, 2 * inner, width, std=0.1, dtype=dtype),
                    bench.normal(num_experts, width, inner, std=0.1, dtype=dtype),
                )
                leaves = [one.requires_grad_() for one in made]
                exact = [one.detach().double().requires_grad_() for one in made]
                found = experts.run_experts(leaves[0], ids, *leaves[1:])
                wanted = experts.run_experts_reference(exact[0], ids, *exact[1:])
                close(found, wanted, bound, "output")
                grads = zip(
                    torch.autograd.grad(found.sum(), leaves),
                    torch.autograd.grad(wanted.sum(), exact),
                    ("x", "weights", "gate_up", "down"),
                    strict=True,
                )
                for ours, plain, name in grads:
                    close(ours, plain, bound, f"gradient of {name}")


def measure_experts(bench: Bench) -> None:
    """The six products of the experts by every candidate, then what stands between them."""
    check_experts(bench)
    num_experts, hidden, inner, num_tokens = sizes(bench)
    ids = chosen(bench, num_tokens, num_experts)
    counts = ids.flatten().bincount(minlength=num_experts)
    ends = counts.cumsum(0).int()
    num_rows = ids.numel()
    ways: dict[str, Any] = {}
    if bench.device == "cuda":
        shape = TileShape.of(BF16)
        ways["the model's"] = Mixed(ends, num_rows, shape)
        ways["torch"] = Grouped(ends)
        for s in TILE_SHAPES[:1] if bench.is_quick else TILE_SHAPES:
            name = f"triton {s.m}x{s.n}x{s.k} w{s.warps} s{s.stages}"
            ways[name] = Tiled(ends, num_rows, s)
    else:
        ways["loop"] = experts.Looped(counts.tolist())
    default = next(iter(ways))  # what lay_out takes for bfloat16
    default_ms = best_ms = 0.0
    for product, (b, a) in {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}.items():
        w = bench.normal(num_experts, b, a, std=a**-0.5)
        x, y = bench.normal(num_rows, a), bench.normal(num_rows, b)
        for kind in ("forward", "dgrad", "wgrad"):
            found_ms = measure_product(bench, ways, product, kind, (x, w, y), ends)
            best_ms += min(found_ms.values(), default=float("nan"))
            default_ms += found_ms.get(default, float("nan"))
        del w, x, y
    total_flops = 3 * 2 * num_rows * 3 * inner * hidden
    ceiling = bench.ceilings["product_tflops"] * 1e9
    bench.results["grouped_gemm_share_16k"] = total_flops / default_ms / ceiling
    bench.results["grouped_gemm_share_16k_best"] = total_flops / best_ms / ceiling
    measure_between(bench, num_rows, num_tokens, ids.shape[1])


def measure_product(
    bench: Bench,
    ways: dict[str, Any],
    product: str,
    kind: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    ends: Tensor,
) -> dict[str, float]:
    """Milliseconds of one product by every way, each checked on the last expert with rows."""
    x, w, y = tensors
    bounds = [0, *ends.tolist()]
    last = max(e for e in range(len(ends)) if bounds[e + 1] > bounds[e])
    rows = slice(bounds[last], bounds[last + 1])
    wanted = {
        "forward": lambda: x[rows].float() @ w[last].float().t(),
        "dgrad": lambda: y[rows].float() @ w[last].float(),
        "wgrad": lambda: y[rows].float().t() @ x[rows].float(),
    }[kind]()
    found_ms: dict[str, float] = {}
    for name, way in ways.items():
        run = {
            "forward": lambda way=way: way.apply(x, w),
            "dgrad": lambda way=way: way.pull(y, w),
            "wgrad": lambda way=way: way.outer(y, x),
        }[kind]
        with bench.kernel(f"experts {product} {kind} {name}"):
            got = run()
            error = close(got[last] if kind == "wgrad" else got[rows], wanted, 1e-2, kind)
            del got
            found_ms[name] = bench.ms(run)
            bench.row(
                f"experts, {product} {kind}",
                f"{len(x)} rows, {' x '.join(str(size) for size in w.shape)}",
                name,
                found_ms[name],
                flops=2 * len(x) * w.shape[1] * w.shape[2],
                gigabytes=2 * (w.numel() + x.numel() + y.numel()) / 1e9,
                error=error,
            )
    return found_ms


def measure_between(bench: Bench, num_rows: int, num_tokens: int, num_chosen: int) -> None:
    """What stands between the products."""
    _, hidden, inner, _ = sizes(bench)
    rows_shape = f"{num_rows} rows x {inner}"
    h, da = bench.normal(num_rows, 2 * inner), bench.normal(num_rows, inner)
    weights = torch.rand(num_rows, device=bench.device)
    pairs: list[tuple[str, Any, Any, int]] = [
        ("swiglu", fused.swiglu, experts.swiglu, 3),
        ("swiglu backward", fused.swiglu_backward, experts.swiglu_backward, 6),
    ]
    for name, by_triton, plain, passes in pairs:
        arguments = (h, weights) if passes == 3 else (h, weights, da)
        gigabytes = passes * num_rows * inner * 2 / 1e9
        for candidate, run in {"ours": by_triton, "plain": plain}.items():
            if candidate == "ours" and bench.device != "cuda":
                continue
            with bench.kernel(f"experts {name} {candidate}"):
                ms = bench.ms(lambda run=run, arguments=arguments: run(*arguments))
                bench.row(f"experts, {name}", rows_shape, candidate, ms, gigabytes=gigabytes)
    del h, da
    y = bench.normal(num_rows, hidden)
    row_of = torch.randperm(num_rows, device=bench.device)
    for candidate, run in {"ours": fused.combine, "plain": experts.combine}.items():
        if candidate == "ours" and bench.device != "cuda":
            continue
        with bench.kernel(f"experts combine {candidate}"):
            ms = bench.ms(lambda run=run: run(y, row_of, num_chosen))
            gigabytes = (num_rows + num_tokens) * hidden * 2 / 1e9
            shape = f"{num_rows} rows x {hidden}"
            bench.row("experts, combine", shape, candidate, ms, gigabytes=gigabytes)
    x = bench.normal(num_tokens, hidden)
    with bench.kernel("experts gather"):
        ms = bench.ms(lambda: x.index_select(0, row_of // num_chosen))
        shape = f"{num_rows} rows x {hidden}"
        bench.row("experts, gather", shape, "torch", ms, gigabytes=num_rows * hidden * 2 / 1e9)


def measure_layer(bench: Bench) -> None:
    """Router to combine at 16,384 tokens, forward and backward, gradients of everything."""
    num_experts, hidden, inner, num_tokens = sizes(bench)
    with bench.kernel("layer"):
        x = bench.normal(num_tokens, hidden).requires_grad_()
        gate = bench.normal(num_experts, hidden, std=hidden**-0.5).requires_grad_()
        bias = torch.zeros(num_experts, device=bench.device)
        gate_up = bench.normal(num_experts, 2 * inner, hidden, std=hidden**-0.5).requires_grad_()
        down = bench.normal(num_experts, hidden, inner, std=inner**-0.5).requires_grad_()
        direction = bench.normal(num_tokens, hidden)
        num_chosen = min(CHOSEN, num_experts // 2)

        def layer(x: Tensor) -> Tensor:
            ids, weights = router.route(x, gate, bias, num_chosen, 2.827)
            return experts.run_experts(x, ids, weights, gate_up, down)

        with torch.no_grad():
            few = slice(0, 4)
            ids, weights = router.route(x[few], gate, bias, num_chosen, 2.827)
            named = ids.unique()
            places = torch.searchsorted(named, ids)
            exact = [one[named].double() for one in (gate_up, down)]
            wanted = experts.run_experts_reference(x[few].double(), places, weights, *exact)
            error = close(layer(x)[few], wanted, 2e-2, "output")
            del exact

        def step() -> None:
            torch.autograd.grad(layer(x), (x, gate, gate_up, down), direction)

        flops = 3 * (
            6 * num_tokens * num_chosen * hidden * inner + 2 * num_tokens * hidden * num_experts
        )
        ms = bench.ms(step, limit_s=1.5)
        shape = f"{num_tokens} tokens, {num_experts} x {inner} of {hidden}"
        bench.row("mixture, forward and backward", shape, "ours", ms, flops=flops, error=error)
        ceiling = bench.ceilings["product_tflops"] * 1e9
        bench.results["moe_layer_train_share_16k"] = flops / ms / ceiling
        with bench.kernel("layer profile"):
            bench.results["moe_layer_profile"] = profile(bench, step)


def profile(bench: Bench, step: Callable[[], None]) -> list[dict[str, Any]]:
    """Where the time of one step goes: the dearest kernels."""
    if bench.device != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)[:14]
    return [
        {"kernel": e.key[:100], "calls": e.count, "ms": round(e.device_time_total / 1e3, 3)}
        for e in events
    ]


# -- attention --------------------------------------------------------------------------------


def measure_attention(bench: Bench) -> None:
    """MLA's full form: long sequences at K2.5's widths, many short branches at nano's."""
    cases = {
        "8 x 2048": ([2048] * 8, None, HEADS, KEY_WIDTH, VALUE_WIDTH),
        "64 branches of 24 to 400 behind 8 prompts of 600": (*short_branches(), 8, 64, 32),
    }
    if bench.is_mini:
        cases = {"mini": ([5, 3, 4], [None, 0, 0], 2, 16, 8)}
    for name, (lengths, prefix_of, heads, width, value_width) in cases.items():
        compare_attention(
            bench, name, lengths, prefix_of, heads, width, value_width, is_causal=True
        )


def measure_vision(bench: Bench) -> None:
    """MoonViT: full attention inside pictures of several sizes, heads 72 wide."""
    lengths = [1024, 4096, 2500, 784, 1600, 4096]
    heads, width = (2, 16) if bench.is_mini else (16, 72)
    compare_attention(
        bench,
        "pictures of 784 to 4096 patches",
        [4, 6] if bench.is_mini else lengths,
        None,
        heads,
        width,
        width,
        is_causal=False,
    )


def short_branches() -> tuple[list[int], list[int | None]]:
    """What PARL packs: a prompt, its responses, the next prompt."""
    lengths: list[int] = []
    prefix_of: list[int | None] = []
    for question in range(8):
        start = len(lengths)
        lengths.append(600)
        prefix_of.append(None)
        for answer in range(8):
            lengths.append(24 + (question * 8 + answer) * 37 % 377)
            prefix_of.append(start)
    return lengths, prefix_of


def compare_attention(
    bench: Bench,
    name: str,
    lengths: list[int],
    prefix_of: list[int | None] | None,
    heads: int,
    width: int,
    value_width: int,
    *,
    is_causal: bool,
) -> None:
    """Forward and backward by every candidate; gradients are checked too, of two heads."""
    num_tokens = sum(lengths)
    before = prefix_of or [None] * len(lengths)
    q, k = (bench.normal(num_tokens, heads, width).requires_grad_() for _ in range(2))
    v = bench.normal(num_tokens, heads, value_width).requires_grad_()
    direction = bench.normal(num_tokens, heads, value_width)
    scale = width**-0.5
    packing = Packing(lengths, q.device, before)
    pairs = sum(
        length * (lengths[one] if one is not None else 0) + length**2 * (0.5 if is_causal else 1.0)
        for length, one in zip(lengths, before, strict=True)
    )
    flops = 3.5 * 2 * pairs * heads * (width + value_width)

    def one_by_one(backends: list[SDPBackend], *, pads: bool = True) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if pads:
                v = functional.pad(v, (0, width - value_width))
            qs, ks, vs = (x.split(lengths) for x in (q, k, v))
            outs = []
            with sdpa_kernel(backends):
                for index, one in enumerate(before):
                    keys, values = ks[index], vs[index]
                    if one is not None:
                        keys, values = torch.cat([ks[one], keys]), torch.cat([vs[one], values])
                    mask = None
                    if is_causal and len(keys) > len(qs[index]):
                        mask = torch.ones(
                            len(qs[index]), len(keys), dtype=torch.bool, device=q.device
                        ).tril(len(keys) - len(qs[index]))
                    out = functional.scaled_dot_product_attention(
                        *(x.transpose(0, 1)[None] for x in (qs[index], keys, values)),
                        attn_mask=mask,
                        is_causal=is_causal and mask is None,
                        scale=scale,
                    )
                    outs.append(out[0].transpose(0, 1))
            return torch.cat(outs)[..., :value_width]

        return run

    def packed(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = attention.keys_of(k, packing), attention.keys_of(v, packing)
            return kernel(q, keys, values, packing, scale=scale, is_causal=is_causal)

        return run

    def ours(tiles: Tiles | None) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention.tiled_attention(
                q, k, v, packing, scale=scale, is_causal=is_causal, tiles=tiles
            )

        return run

    everything = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    everything += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    candidates: dict[str, Callable[..., Tensor]] = {"sdpa one by one": one_by_one(everything)}
    if bench.device == "cuda":
        candidates = {
            "flash, packed": packed(attention.flash_attention),
            "efficient, packed": packed(attention.efficient_attention),
            "sdpa one by one, no cudnn": one_by_one(everything[1:]),
            "sdpa one by one": one_by_one(everything),
            "ours": ours(None),
        }
        for tiles in (ATTENTION_TILES if width > 128 else [WIDE])[: 1 if bench.is_quick else None]:
            candidates[f"ours, {tiles}"] = ours(tiles)
        if not bench.is_quick:  # it compiles for half a minute
            flex = flex_attention(bench, lengths, before, scale, is_causal=is_causal)
            candidates["flex"] = flex
        if prefix_of is None and width != value_width:
            candidates["cudnn one by one, values as they are"] = one_by_one(
                [SDPBackend.CUDNN_ATTENTION], pads=False
            )
    wanted = None
    with bench.kernel(f"attention {name} reference"):
        exact = [x.detach()[:, :2].float().requires_grad_() for x in (q, k, v)]
        out = attention.packed_attention_reference(
            *exact, packing, scale=scale, is_causal=is_causal
        )
        wanted = (out.detach(), *torch.autograd.grad(out, exact, direction[:, :2].float()))
        del out
    for candidate, run in candidates.items():
        with bench.kernel(f"attention {name} {candidate}"):
            started_s = time.perf_counter()
            found = run(q, k, v)
            gradients = torch.autograd.grad(found, (q, k, v), direction)
            if bench.device == "cuda":
                torch.cuda.synchronize()
            first_s = time.perf_counter() - started_s
            assert wanted is not None, "there is no reference to compare with"
            error = close(found[:, :2].detach(), wanted[0], 2e-2, "output")
            errors = {
                one: close(gradient[:, :2], truth, 3e-2, f"gradient of {one}")
                for one, gradient, truth in zip("qkv", gradients, wanted[1:], strict=True)
            }
            del found, gradients

            def step(run: Callable[..., Tensor] = run) -> None:
                torch.autograd.grad(run(q, k, v), (q, k, v), direction)

            bench.row(
                "attention, forward and backward",
                f"{name}, {heads} heads {width}/{value_width}",
                candidate,
                bench.ms(step),
                flops=flops,
                error=error,
                first_call_s=first_s,
                gradient_errors=errors,
                **({"kernels": profile(bench, step)[:6]} if candidate.startswith("ours") else {}),
            )


def flex_attention(
    bench: Bench, lengths: list[int], before: list[int | None], scale: float, *, is_causal: bool
) -> Callable[..., Tensor]:
    """FlexAttention with a mask of documents and their prefixes."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    document_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    document_T = document_T.to(bench.device)
    prefix = torch.tensor([-1 if one is None else one for one in before], device=bench.device)
    compiled = torch.compile(flex, dynamic=False)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        is_own = document_T[q] == document_T[k]
        if is_causal:
            is_own = is_own & (q >= k)
        return is_own | (prefix[document_T[q]] == document_T[k])

    made: list[Any] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not made:
            made.append(create_block_mask(sees, None, None, len(q), len(k), device=bench.device))
        out = compiled(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=made[0], scale=scale
        )
        return out[0].transpose(0, 1)

    return run


def measure_serving(bench: Bench) -> None:
    """SGLang's fused experts in bfloat16, tuned."""
    from fused_moe import tune

    tune(bench, bench.out, is_int4=False)


def measure_serving_int4(bench: Bench) -> None:
    """The same with weights of 4 bits."""
    from fused_moe import tune

    tune(bench, bench.out, is_int4=True)


PARTS: dict[str, Callable[[Bench], None]] = {
    "logprob": measure_logprob,
    "router": measure_router,
    "layer": measure_layer,
    "attention": measure_attention,
    "vision": measure_vision,
    "experts": measure_experts,  # last: candidates that may break the process's context
    "serving": measure_serving,
    "serving_int4": measure_serving_int4,
}
NEED_SGLANG = ("serving", "serving_int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=list(PARTS), default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mini", action="store_true", help="tiny shapes: proves the way")
    parser.add_argument("--quick", action="store_true", help="true shapes, few candidates")
    parser.add_argument("--seconds", type=float, default=600.0, help="no part begins after these")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    measure_ceilings(bench)
    for name in options.only or [part for part in PARTS if part not in NEED_SGLANG]:
        if time.perf_counter() > bench.ends_s:
            bench.failures.append({"kernel": f"part {name}", "error": "left out: no time"})
            continue
        with bench.kernel(f"part {name}"):
            PARTS[name](bench)
        bench.keep()
    print(bench.keep())
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
