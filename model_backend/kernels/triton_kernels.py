"""The kernels behind ``fused.py`` and ``grouped.py``; importing this needs Triton.

Loads are masked at the ends of rows, sums are float32, offsets are int64 where a tensor may hold
more than 2**31 numbers.
"""

# mypy: ignore-errors
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_stats(
    logits, targets, log_sums, means, target_logits, num_words, stride, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a tile: merge it into the row's log sum exp, mean logit and target logit."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    biggest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_words, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < num_words
        x = tl.load(logits + places, mask=inside, other=0.0).to(tl.float32) * factor
        x = tl.where(inside, x, -1e30)
        new = tl.maximum(biggest, x)
        shrink = tl.exp(biggest - new)
        power = tl.where(inside, tl.exp(x - new), 0.0)
        total = total * shrink + power
        moment = moment * shrink + power * x
        biggest = new
    top = tl.max(biggest, 0)
    shrink = tl.exp(biggest - top)
    total_own = tl.sum(total * shrink, 0)
    own = top + tl.log(total_own)
    own_mean = tl.sum(moment * shrink, 0) / total_own
    before = tl.load(log_sums + row)
    high = tl.maximum(before, own)
    merged = high + tl.log(tl.exp(before - high) + tl.exp(own - high))
    mean = tl.load(means + row) * tl.exp(before - merged) + own_mean * tl.exp(own - merged)
    tl.store(means + row, mean)
    tl.store(log_sums + row, merged)
    if (target >= 0) & (target < num_words):
        tl.store(target_logits + row, tl.load(logits + target).to(tl.float32) * factor)


@triton.jit
def tile_gradient(
    logits, targets, log_sums, of_logprobs, entropies, of_entropies, num_words, stride, factor,
    HAS_EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a tile: its logits become their gradient."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    log_sum = tl.load(log_sums + row)
    of_logprob = tl.load(of_logprobs + row)
    for start in range(0, num_words, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < num_words
        x = tl.load(logits + places, mask=inside, other=float("-inf")).to(tl.float32)
        logprob = x * factor - log_sum
        pull = tl.zeros([BLOCK], tl.float32) + of_logprob
        if HAS_EXTRA:
            entropy = tl.load(entropies + row)
            pull += tl.load(of_entropies + row) * (tl.where(inside, logprob, 0.0) + entropy)
        gradient = (tl.where(places == target, of_logprob, 0.0) - tl.exp(logprob) * pull) * factor
        tl.store(logits + places, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(h, weights, a, inner, BLOCK: tl.constexpr):
    """One row: a = silu(gate) * up * weight."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    for start in range(0, inner, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < inner
        gate = tl.load(h + row * 2 * inner + places, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + row * 2 * inner + inner + places, mask=inside, other=0.0).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up * weight
        tl.store(a + row * inner + places, y.to(a.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(h, weights, d_a, d_h, d_weights, a, inner, BLOCK: tl.constexpr):
    """One row: d h, d weight, and a again."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    of_weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inner, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < inner
        gate = tl.load(h + row * 2 * inner + places, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + row * 2 * inner + inner + places, mask=inside, other=0.0).to(tl.float32)
        of_a = tl.load(d_a + row * inner + places, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        y = silu * up
        of_weight += of_a * y
        of_a *= weight
        of_gate = of_a * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        kind = a.dtype.element_ty
        tl.store(d_h + row * 2 * inner + places, of_gate.to(kind), mask=inside)
        tl.store(d_h + row * 2 * inner + inner + places, (of_a * silu).to(kind), mask=inside)
        tl.store(a + row * inner + places, (y * weight).to(kind), mask=inside)
    tl.store(d_weights + row, tl.sum(of_weight, 0))


@triton.jit
def combine(y, row_of, out, width, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one token: the sum of its rows."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < width
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(CHOSEN):
        row = tl.load(row_of + token * CHOSEN + place)
        total += tl.load(y + row * width + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def choose(
    logits, bias, ids, weights, scores, num_experts, scale,
    CHOSEN: tl.constexpr, CHOSEN_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: the experts with the largest biased scores, and their weights."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < num_experts
    x = tl.load(logits + token * num_experts + places, mask=inside, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-x))
    ranked = tl.where(inside, score + tl.load(bias + places, mask=inside, other=0.0), float("-inf"))
    slots = tl.arange(0, CHOSEN_BLOCK)
    found = tl.zeros([CHOSEN_BLOCK], tl.int64)
    kept = tl.zeros([CHOSEN_BLOCK], tl.float32)
    for slot in tl.static_range(CHOSEN):
        best = tl.argmax(ranked, 0)
        value = tl.sum(tl.where(places == best, score, 0.0), 0)
        found = tl.where(slots == slot, best.to(tl.int64), found)
        kept = tl.where(slots == slot, value, kept)
        ranked = tl.where(places == best, float("-inf"), ranked)
    is_slot = slots < CHOSEN
    weight = kept * (scale / (tl.sum(kept, 0) + 1e-20))
    tl.store(ids + token * CHOSEN + slots, found, mask=is_slot)
    tl.store(scores + token * CHOSEN + slots, kept, mask=is_slot)
    tl.store(weights + token * CHOSEN + slots, weight, mask=is_slot)


@triton.jit
def grouped_product(
    x_tiles, w_tiles, out, starts, ends, first_tiles, expert_of_tile, num_experts, N, K,
    W_IS_NK: tl.constexpr, PROGRAMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of out[rows of e] = x[rows of e] w_e, each program every PROGRAMS-th.

    ``w`` is [E, N, K] or, read as it lies, [E, K, N]. Tiles of one expert follow each other, those
    of the same columns first, so that the programs at work share what they read. A tile of x may
    reach into the next expert's rows: those are computed and not stored.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.load(first_tiles + num_experts) * tiles_n
    for tile in range(tl.program_id(0), num_tiles, PROGRAMS):
        expert = tl.load(expert_of_tile + tile // tiles_n)
        first = tl.load(first_tiles + expert)
        tiles_m = tl.load(first_tiles + expert + 1) - first
        local = tile - first * tiles_n
        column = local // tiles_m * BLOCK_N
        row = tl.load(starts + expert) + local % tiles_m * BLOCK_M
        end = tl.load(ends + expert)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for depth in range(0, K, BLOCK_K):
            x = x_tiles.load([row, depth])
            if W_IS_NK:
                w = w_tiles.load([expert * N + column, depth]).T
            else:
                w = w_tiles.load([expert * K + depth, column])
            total = tl.dot(x, w, total, input_precision=PRECISION)
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        places = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
        inside = (rows[:, None] < end) & (columns[None, :] < N)
        tl.store(places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def grouped_outer(
    left_tiles, right_tiles, out, starts, ends, num_experts, M, N,
    PROGRAMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of out_e = left[rows of e]^T right[rows of e], each program every PROGRAMS-th."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_experts * tiles_m * tiles_n, PROGRAMS):
        expert = tile // (tiles_m * tiles_n)
        local = tile % (tiles_m * tiles_n)
        row = local % tiles_m * BLOCK_M
        column = local // tiles_m * BLOCK_N
        start = tl.load(starts + expert)
        end = tl.load(ends + expert)
        whole = start + (end - start) // BLOCK_K * BLOCK_K
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for depth in range(start, whole, BLOCK_K):
            left = left_tiles.load([depth, row])
            right = right_tiles.load([depth, column])
            total = tl.dot(left.T, right, total, input_precision=PRECISION)
        if whole < end:
            is_own = (whole + tl.arange(0, BLOCK_K) < end)[:, None]
            left = left_tiles.load([whole, row])
            left = tl.where(is_own, left, tl.zeros_like(left))
            right = right_tiles.load([whole, column])
            total = tl.dot(left.T, right, total, input_precision=PRECISION)
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        places = (
            out + expert.to(tl.int64) * M * N + rows.to(tl.int64)[:, None] * N + columns[None, :]
        )
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        tl.store(places, total.to(out.dtype.element_ty), mask=inside)
