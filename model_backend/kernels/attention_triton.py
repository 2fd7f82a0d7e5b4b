"""The kernels of ``tiled_attention.py``; importing this needs Triton.

One program makes one tile of one head. What stays through its loop is read once, zeros outside the
sequence and the head; what goes by is read by Hopper's copies of tiles of [T, H * K], which may
reach into the next sequence's rows and, where parts are wider than a head, into the next head. A
width is held in two parts that are powers of two, 192 = 128 + 64, the second of which may be
absent. Masks are in loops of their own, so that most blocks have none.
"""

# Shapes: Q = queries of a block, S = keys of a block.

# mypy: ignore-errors
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_tokens"])
def forward(
    q, k0_tiles, k1_tiles, v0_tiles, v1_tiles, out, log_sums, tiles,
    num_tokens, num_heads, scale,
    HAS_PREFIX: tl.constexpr, IS_CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """The output of a tile of queries, and the log2 of each one's sum of exponentials."""
    head = tl.program_id(1)
    tiles += tl.program_id(0) * 5
    row, end, own = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    rows_Q = row + tl.arange(0, QUERIES)
    q0, q1 = _load(q, row, end, head, num_heads, QUERIES, K, K0, K1)
    factor = scale * LOG2_E
    most_Q = tl.full([QUERIES], float("-inf"), tl.float32)
    total_Q = tl.zeros([QUERIES], tl.float32)
    out0 = tl.zeros([QUERIES, V0], tl.float32)
    if V1:
        out1 = tl.zeros([QUERIES, V1], tl.float32)
    for phase in tl.static_range(0 if HAS_PREFIX else 2, 4):
        start, stop = _keys_of(phase, tiles, row, end, own, IS_CAUSAL, QUERIES, KEYS)
        for key in range(start, stop, KEYS):
            k0, k1 = _parts(k0_tiles, k1_tiles, key, head, K, K0, K1)
            v0, v1 = _parts(v0_tiles, v1_tiles, key, head, V, V0, V1)
            logits_QS = _products(q0, q1, k0, k1, K1)
            if phase % 2:
                is_seen_QS = _is_seen(phase, rows_Q, key, stop, IS_CAUSAL, KEYS)
                logits_QS = tl.where(is_seen_QS, logits_QS, float("-inf"))
            higher_Q = tl.maximum(most_Q, tl.max(logits_QS, 1) * factor)
            weights_QS = tl.exp2(logits_QS * factor - higher_Q[:, None])
            shrink_Q = tl.exp2(most_Q - higher_Q)
            total_Q = total_Q * shrink_Q + tl.sum(weights_QS, 1)
            most_Q = higher_Q
            near_QS = weights_QS.to(v0.dtype)
            out0 = tl.dot(near_QS, v0, out0 * shrink_Q[:, None])
            if V1:
                out1 = tl.dot(near_QS, v1, out1 * shrink_Q[:, None])
    row = tl.load(tiles, volatile=True)  # again, so that no addresses are held through the loop
    rows_Q = row + tl.arange(0, QUERIES)
    places = log_sums + head.to(tl.int64) * num_tokens + rows_Q
    tl.store(places, most_Q + tl.log2(total_Q), mask=rows_Q < end)
    _store(out, out0 / total_Q[:, None], row, end, head, num_heads, 0, QUERIES, V, V0)
    if V1:
        _store(out, out1 / total_Q[:, None], row, end, head, num_heads, V0, QUERIES, V, V1)


@triton.jit(do_not_specialize=["num_tokens"])
def backward_queries(
    q, k0_tiles, k1_tiles, v0_tiles, v1_tiles, out, d_out, d_q, log_sums, deltas, tiles,
    num_tokens, num_heads, scale,
    HAS_PREFIX: tl.constexpr, IS_CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, and ``out . d_out`` of each for ``backward_keys``."""
    head = tl.program_id(1)
    tiles += tl.program_id(0) * 5
    row, end, own = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    rows_Q = row + tl.arange(0, QUERIES)
    places = head.to(tl.int64) * num_tokens + rows_Q
    log_sum_Q = tl.load(log_sums + places, mask=rows_Q < end, other=float("inf"))
    q0, q1 = _load(q, row, end, head, num_heads, QUERIES, K, K0, K1)
    d_out0, d_out1 = _load(d_out, row, end, head, num_heads, QUERIES, V, V0, V1)
    out0, out1 = _load(out, row, end, head, num_heads, QUERIES, V, V0, V1)
    delta_Q = tl.sum(out0.to(tl.float32) * d_out0.to(tl.float32), 1)
    if V1:
        delta_Q += tl.sum(out1.to(tl.float32) * d_out1.to(tl.float32), 1)
    tl.store(deltas + places, delta_Q, mask=rows_Q < end)
    factor = scale * LOG2_E
    d_q0 = tl.zeros([QUERIES, K0], tl.float32)
    if K1:
        d_q1 = tl.zeros([QUERIES, K1], tl.float32)
    for phase in tl.static_range(0 if HAS_PREFIX else 2, 4):
        start, stop = _keys_of(phase, tiles, row, end, own, IS_CAUSAL, QUERIES, KEYS)
        for key in range(start, stop, KEYS):
            k0, k1 = _parts(k0_tiles, k1_tiles, key, head, K, K0, K1)
            v0, v1 = _parts(v0_tiles, v1_tiles, key, head, V, V0, V1)
            logits_QS = _products(q0, q1, k0, k1, K1)
            d_weights_QS = _products(d_out0, d_out1, v0, v1, V1)
            weights_QS = tl.exp2(logits_QS * factor - log_sum_Q[:, None])
            if phase % 2:
                is_seen_QS = _is_seen(phase, rows_Q, key, stop, IS_CAUSAL, KEYS)
                weights_QS = tl.where(is_seen_QS, weights_QS, 0.0)
            d_logits_QS = (weights_QS * (d_weights_QS - delta_Q[:, None])).to(k0.dtype)
            d_q0 = tl.dot(d_logits_QS, k0, d_q0)
            if K1:
                d_q1 = tl.dot(d_logits_QS, k1, d_q1)
    row = tl.load(tiles, volatile=True)  # again, so that no addresses are held through the loop
    _store(d_q, d_q0 * scale, row, end, head, num_heads, 0, QUERIES, K, K0)
    if K1:
        _store(d_q, d_q1 * scale, row, end, head, num_heads, K0, QUERIES, K, K1)


@triton.jit(do_not_specialize=["num_tokens"])
def backward_keys(
    q0_tiles, q1_tiles, k, v, d_out0_tiles, d_out1_tiles, d_k, d_v, log_sums, deltas,
    tiles, ranges, num_tokens, num_heads, scale,
    IS_CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and of its values: sums over the queries that see them.

    Queries past a range are left out by an infinite log sum.
    """
    head = tl.program_id(1)
    tiles += tl.program_id(0) * 4
    row, end = tl.load(tiles), tl.load(tiles + 1)
    first_range, last_range = tl.load(tiles + 2), tl.load(tiles + 3)
    log_sums += head.to(tl.int64) * num_tokens
    deltas += head.to(tl.int64) * num_tokens
    keys_S = row + tl.arange(0, KEYS)
    k0, k1 = _load(k, row, end, head, num_heads, KEYS, K, K0, K1)
    v0, v1 = _load(v, row, end, head, num_heads, KEYS, V, V0, V1)
    factor = scale * LOG2_E
    d_k0 = tl.zeros([KEYS, K0], tl.float32)
    d_v0 = tl.zeros([KEYS, V0], tl.float32)
    if K1:
        d_k1 = tl.zeros([KEYS, K1], tl.float32)
    if V1:
        d_v1 = tl.zeros([KEYS, V1], tl.float32)
    # First the diagonal, where not every query sees every key; then whole blocks; then the rests.
    whole = row + tl.cdiv(KEYS, QUERIES) * QUERIES
    for phase in tl.static_range(0 if IS_CAUSAL else 1, 3):
        for one in range(first_range, last_range if phase else first_range + 1):
            start = tl.load(ranges + 2 * one)
            end_of_range = tl.load(ranges + 2 * one + 1)
            if phase == 0:
                start = row
                stop = tl.minimum(whole, end_of_range)
            else:
                if IS_CAUSAL:
                    start = tl.where(start <= row, whole, start)
                stop = start + tl.maximum(end_of_range - start, 0) // QUERIES * QUERIES
            if phase == 2:
                start = stop
                stop = end_of_range
            for query in range(start, stop, QUERIES):
                rows_Q = query + tl.arange(0, QUERIES)
                q0, q1 = _parts(q0_tiles, q1_tiles, query, head, K, K0, K1)
                d_out0, d_out1 = _parts(d_out0_tiles, d_out1_tiles, query, head, V, V0, V1)
                # Each number is asked for as late as can be: registers are what this kernel lacks.
                logits_SQ = _products(k0, k1, q0, q1, K1)
                if phase == 1:
                    log_sum_Q = tl.load(log_sums + rows_Q)
                else:
                    is_in_Q = rows_Q < end_of_range
                    log_sum_Q = tl.load(log_sums + rows_Q, mask=is_in_Q, other=float("inf"))
                weights_SQ = tl.exp2(logits_SQ * factor - log_sum_Q[None, :])
                if phase == 0:
                    is_seen_SQ = keys_S[:, None] <= rows_Q[None, :]
                    weights_SQ = tl.where(is_seen_SQ, weights_SQ, 0.0)
                near_SQ = weights_SQ.to(d_out0.dtype)
                d_v0 = tl.dot(near_SQ, d_out0, d_v0)
                if V1:
                    d_v1 = tl.dot(near_SQ, d_out1, d_v1)
                d_weights_SQ = _products(v0, v1, d_out0, d_out1, V1)
                if phase == 1:
                    delta_Q = tl.load(deltas + rows_Q)
                else:
                    delta_Q = tl.load(deltas + rows_Q, mask=is_in_Q, other=0.0)
                d_logits_SQ = (weights_SQ * (d_weights_SQ - delta_Q[None, :])).to(q0.dtype)
                d_k0 = tl.dot(d_logits_SQ, q0, d_k0)
                if K1:
                    d_k1 = tl.dot(d_logits_SQ, q1, d_k1)
    row = tl.load(tiles, volatile=True)  # again, so that no addresses are held through the loop
    _store(d_k, d_k0 * scale, row, end, head, num_heads, 0, KEYS, K, K0)
    _store(d_v, d_v0, row, end, head, num_heads, 0, KEYS, V, V0)
    if K1:
        _store(d_k, d_k1 * scale, row, end, head, num_heads, K0, KEYS, K, K1)
    if V1:
        _store(d_v, d_v1, row, end, head, num_heads, V0, KEYS, V, V1)


@triton.jit
def _keys_of(
    phase: tl.constexpr, tiles, row, end, own,
    IS_CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Start and stop of keys: the prefix's whole blocks, its rest, the own ones', their rest."""
    if phase < 2:
        start = tl.load(tiles + 3)
        stop = tl.load(tiles + 4)
        whole = start + (stop - start) // KEYS * KEYS
    elif IS_CAUSAL:
        start = own
        stop = tl.minimum(row + QUERIES, end)
        whole = own + (row - own) // KEYS * KEYS
    else:
        start = own
        stop = end
        whole = own + (end - own) // KEYS * KEYS
    if phase % 2:
        start = whole
    else:
        stop = whole
    return start, stop


@triton.jit
def _is_seen(
    phase: tl.constexpr, rows_Q, key, stop, IS_CAUSAL: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Which keys of a block that ends a range each query sees."""
    keys_S = key + tl.arange(0, KEYS)
    if IS_CAUSAL and phase == 3:
        is_seen_QS = keys_S[None, :] <= rows_Q[:, None]
    else:
        is_seen_QS = (keys_S < stop)[None, :]
    return is_seen_QS


@triton.jit
def _parts(
    tiles0, tiles1, row, head,
    WIDTH: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr,
):  # fmt: skip
    """Both parts of a head's rows; the first again where there is no second."""
    x0 = tiles0.load([row, head * WIDTH])
    x1 = x0
    if WIDTH1:
        x1 = tiles1.load([row, head * WIDTH + WIDTH0])
    return x0, x1


@triton.jit
def _load(
    x, row, end, head, num_heads, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr,
):  # fmt: skip
    """Both parts of a head's rows, zeros outside the sequence and the head."""
    places, inside = _places(row, end, head, num_heads, 0, ROWS, WIDTH, WIDTH0)
    x0 = tl.load(x + places, mask=inside, other=0.0)
    x1 = x0
    if WIDTH1:
        places, inside = _places(row, end, head, num_heads, WIDTH0, ROWS, WIDTH, WIDTH1)
        x1 = tl.load(x + places, mask=inside, other=0.0)
    return x0, x1


@triton.jit
def _products(a0, a1, b0, b1, HAS_TWO: tl.constexpr):
    """Every row of ``a`` times every row of ``b``."""
    products = tl.dot(a0, b0.T)
    if HAS_TWO:
        products = tl.dot(a1, b1.T, products)
    return products


@triton.jit
def _store(
    out, x, row, end, head, num_heads,
    FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Write a part of a head's rows, from column FIRST."""
    places, inside = _places(row, end, head, num_heads, FIRST, ROWS, WIDTH, PART)
    tl.store(out + places, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _places(
    row, end, head, num_heads,
    FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Where a part of a head's rows lies, and what of it belongs to the sequence and the head."""
    rows = row + tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, PART)
    inside = (rows[:, None] < end) & (columns[None, :] < WIDTH)
    places = (rows.to(tl.int64) * num_heads + head)[:, None] * WIDTH + columns[None, :]
    return places, inside
