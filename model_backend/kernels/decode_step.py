"""One token of each of a few sequences through the whole network, on the threads of a CPU.

    embed ── layers ─┬─ norm ── qkv_a ─┬─ norm ── q_b, W_UK: queries over latents ─┐
                     │                 └─ norm, rotate: the key of this token ─────┤
                     │   += o <── W_UV <── merge <── attention over pages <────────┘
                     └─ norm ── router ── gate, up ── silu, * ── += down ── norm ── lm_head

All threads are in ``run`` at once, each on its share of the columns (of the rows in attention), and
meet between the stages. A weight is read once a step, whatever the number of rows, and an expert
only if a row chose it. Weights that bfloat16 holds exactly are kept so and widened in registers:
half the bytes, and every product and sum in float32 all the same.

``KimiModel.forward`` is the truth that this is tested against.
"""

# Shapes: B = rows, one a sequence, D = hidden, H = heads, N = nope, R = rope, L = latent,
# W = L + R (one cached token), V = value width, Q = q_lora_rank, E = experts, K = experts a token,
# I = inner width, C = rows of all experts, the shared one last. All arrays are flat.

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from swarm_sdk.model_backend.kernels.simd import (
    add,
    add_rows,
    compiled,
    divide,
    exponential,
    highest,
    highest_of_parity,
    inlined,
    load,
    load_weights,
    look,
    maximum,
    multiply,
    multiply_add,
    multiply_add_pairs,
    multiply_add_rows,
    multiply_rows,
    offer_core,
    offsets,
    prefetch_rows,
    prefetch_weights,
    splat,
    stay_apart,
    store,
    store_rows,
    store_totals,
    subtract,
    take_ticket,
    total,
    wait_for_all,
    zeros,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Integers = NDArray[np.int64]

TILE = 16
"""Columns of one product."""
STORE: Any = np.int64(0)
ADD: Any = np.int64(1)
"""Whether a product replaces what is there. Numpy's numbers are no literals to numba, which would
compile a function anew for each."""
NONE: Any = np.int64(0)
PAIR: Any = np.int64(2)
"""Counts, likewise."""
GROUP = 4
"""Heads that attention scores at once, with three keys."""
BLOCK = 24
"""Keys of one turn of the running softmax: a multiple of six; they stay in the first cache."""
IDLE_SPINS = 200_000
"""Looks for the next step before a helping thread goes to sleep: about half a millisecond."""

# Places in a layer's row of the table: of matrices in rows of 16 weights, of vectors in numbers.
QKV_A, Q_B, W_UK, W_UV, OUT, ROUTER, GATE_UP, DOWN, SHARED_GATE_UP, SHARED_DOWN = range(10)
INPUT_NORM, Q_NORM, LATENT_NORM, POST_NORM, BIAS = range(10, 15)
NUM_EXPERTS, SHARED_INNER = 15, 16
TABLE_WIDTH = 17

# Places in ``control``, each on a cache line of its own.
BARRIER, POSTED, NUM_ROWS, ATTENTION = 0, 8, 16, 24


class Shape(NamedTuple):
    """Widths of the network; padded ones are multiples of 16."""

    layers: int
    hidden: int
    heads: int
    nope: int
    rope: int
    latent: int
    q_rank: int
    experts: int
    chosen: int
    inner: int
    vocabulary: int
    a_padded: int
    q_padded: int
    """Of one head, as all below."""
    key_padded: int
    value_padded: int
    page_size: int
    pages: int
    """Columns of the table of pages."""
    slots: int
    eps: float
    softmax_scale: float
    routed_scale: float
    head_norm: int
    """Places of the final norm and of lm_head."""
    head: int


class Buffers(NamedTuple):
    """What a step reads and writes besides weights; made once for the most rows."""

    kv: Floats
    """[layers, slots, W]: the cache."""
    embedding: Floats
    rotation: Floats
    """[positions, R / 2, 2]: cosine and sine."""
    ids: Integers
    positions: Integers
    pages: Integers
    """[B, pages]"""
    x: Floats
    a: Floats
    q: Floats
    q_key: Floats
    """[B, H, W padded]: queries over the cached vectors."""
    parts: Floats
    """[B * parts, H, L]: sums of latents, weighted."""
    stats: Floats
    """[B * parts, 2, H]: the highest score, and the sum of the weights relative to it."""
    value: Floats
    inner: Floats
    """[C, I]"""
    logits: Floats
    best: Integers
    logprobs: Floats
    private: Floats
    """[threads, …], as the next."""
    places: Integers
    control: Integers


@compiled
def _share(count: int, thread: int, num_threads: int) -> tuple[int, int]:
    return count * thread // num_threads, count * (thread + 1) // num_threads


@compiled
def _lay(at: Integers, base: int, stride: int, num: int) -> None:
    for row in range(num):
        at[row] = base + row * stride


@compiled
def _rows(
    sums: Any,
    w: Any,
    w_row: int,
    depth: int,
    x: Floats,
    x_at: Integers,
    y: Floats,
    y_at: Integers,
    first: int,
    column: int,
    mode: int,
    ahead: int,
) -> None:
    """Multiply as many rows as ``sums`` has by one tile of a matrix."""
    at = offsets(sums, x_at, first)
    for k in range(depth):
        prefetch_weights(w, ahead + k)
        sums = multiply_add_rows(sums, x, at, k, load_weights(w, w_row + k))
    to = offsets(sums, y_at, first)
    if mode == ADD:
        add_rows(y, to, column, sums)
    else:
        store_rows(y, to, column, sums)


@compiled
def _one_row(
    w: Any,
    w_row: int,
    depth: int,
    x: Floats,
    x_at: Integers,
    y: Floats,
    y_at: Integers,
    first: int,
    column: int,
    mode: int,
    ahead: int,
) -> None:
    """The same for a single row: four sums in turn, so that none waits for itself."""
    a, b, c, d = zeros(4, 16)
    at = x_at[first]
    for k in range(0, depth, 4):
        prefetch_weights(w, ahead + k)
        prefetch_weights(w, ahead + k + 2)
        a = multiply_add(splat(a, x[at + k]), load_weights(w, w_row + k), a)
        b = multiply_add(splat(b, x[at + k + 1]), load_weights(w, w_row + k + 1), b)
        c = multiply_add(splat(c, x[at + k + 2]), load_weights(w, w_row + k + 2), c)
        d = multiply_add(splat(d, x[at + k + 3]), load_weights(w, w_row + k + 3), d)
    result = add(add(a, b), add(c, d))
    place = y_at[first] + column
    if mode == ADD:
        result = add(load(y, place, 16), result)
    store(y, place, result)


@compiled
def product(
    w: Any,
    w_row: int,
    depth: int,
    x: Floats,
    x_at: Integers,
    y: Floats,
    y_at: Integers,
    num: int,
    column: int,
    mode: int,
    ahead: int,
) -> None:
    """Columns ``column … + 16`` of y = x W, or y += x W, for ``num`` rows that lie anywhere.

    Row r is read from ``x[x_at[r]:]`` and written to ``y[y_at[r]:]``. Weights from row ``ahead``
    on, those of the next product, are fetched meanwhile.
    """
    first = NONE
    while first < num:
        left = num - first
        take = left if left <= 6 else 6 if left >= 12 else (left + 1) // 2
        if take == 6:
            _rows(zeros(6, 16), w, w_row, depth, x, x_at, y, y_at, first, column, mode, ahead)
        elif take == 5:
            _rows(zeros(5, 16), w, w_row, depth, x, x_at, y, y_at, first, column, mode, ahead)
        elif take == 4:
            _rows(zeros(4, 16), w, w_row, depth, x, x_at, y, y_at, first, column, mode, ahead)
        elif take == 3:
            _rows(zeros(3, 16), w, w_row, depth, x, x_at, y, y_at, first, column, mode, ahead)
        elif take == 2:
            _rows(zeros(2, 16), w, w_row, depth, x, x_at, y, y_at, first, column, mode, ahead)
        else:
            _one_row(w, w_row, depth, x, x_at, y, y_at, first, column, mode, ahead)
        first += take


@compiled
def _tiles(
    w: Any,
    w_row: int,
    depth: int,
    start: int,
    stop: int,
    x: Floats,
    x_at: Integers,
    y: Floats,
    y_at: Integers,
    num: int,
    mode: int,
    ahead: int,
) -> None:
    """Tiles ``start … stop`` of a matrix that begins at row ``w_row``; then come ``ahead``'s."""
    stay_apart()
    for tile in range(start, stop):
        at = w_row + tile * depth
        following = at + depth if tile + 1 < stop else ahead
        product(w, at, depth, x, x_at, y, y_at, num, tile * TILE, mode, following)


@compiled
def _norm(
    x: Floats,
    x_at: int,
    x_stride: int,
    num: int,
    width: int,
    weight: Floats,
    weight_at: int,
    eps: float,
    y: Floats,
    y_at: int,
    y_stride: int,
) -> None:
    """RMSNorm of ``num`` rows."""
    for row in range(num):
        source, target = x_at + row * x_stride, y_at + row * y_stride
        squares = zeros(1, 16)[0]
        for c in range(0, width, 16):
            value = load(x, source + c, 16)
            squares = multiply_add(value, value, squares)
        scale = splat(squares, np.float32(1.0 / math.sqrt(total(squares) / width + eps)))
        for c in range(0, width, 16):
            value = multiply(load(x, source + c, 16), scale)
            store(y, target + c, multiply(value, load(weight, weight_at + c, 16)))


@compiled
def _rotate(
    x: Floats, x_at: int, rotation: Floats, at: int, width: int, y: Floats, y_at: int
) -> None:
    """Turn adjacent pairs of channels."""
    for c in range(0, width, 2):
        first, second = x[x_at + c], x[x_at + c + 1]
        cosine, sine = rotation[at + c], rotation[at + c + 1]
        y[y_at + c] = first * cosine - second * sine
        y[y_at + c + 1] = first * sine + second * cosine


@compiled
def _find(
    shape: Shape, pages: Integers, row: int, start: int, stop: int, base: int, at: Integers
) -> None:
    """Places of a block of keys, page by page; the last one again behind ``stop``."""
    page, offset = row * shape.pages + start // shape.page_size, start % shape.page_size
    width, num, i = shape.latent + shape.rope, min(BLOCK, stop - start), 0
    while i < num:
        place = base + (pages[page] * shape.page_size + offset) * width
        end = min(i + shape.page_size - offset, num)
        _lay(at[i:], place, width, end - i)
        page, offset, i = page + 1, 0, end
    last = at[num - 1] if num > 0 else base
    for i in range(num, BLOCK):
        at[i] = last


@compiled
def _attend(
    shape: Shape,
    buffers: Buffers,
    layer: int,
    row: int,
    first_key: int,
    last_key: int,
    part: int,
    next_row: int,
    private: Floats,
    places: Integers,
) -> None:
    """Attention of one row over its keys ``first_key … last_key``: the absorbed form.

    All heads read the same keys, so a block of them, fetched once, serves two small matrix
    products of ``GROUP`` heads: queries with keys (12 scores at a time, lanes are channels), then
    weights with latents. The softmax runs along: when a block raises the highest score, what was
    summed before shrinks.
    """
    stay_apart()
    width, latent, heads = shape.latent + shape.rope, shape.latent, shape.heads
    kv, query, out, stats = buffers.kv, buffers.q_key, buffers.parts, buffers.stats
    scores, tops = private[: 8 + heads * BLOCK], private[8 + heads * BLOCK :]
    masses, shrinks = tops[4 * heads :], tops[8 * heads :]
    query_at, out_at = places[2 * BLOCK : 2 * BLOCK + heads], places[2 * BLOCK + heads :]
    _lay(query_at, row * heads * shape.key_padded, shape.key_padded, heads)
    _lay(out_at, part * heads * latent, latent, heads)
    none = splat(zeros(1, 8)[0], np.float32(-1e30))
    scale = splat(none, np.float32(shape.softmax_scale))
    two, four, six = zeros(2, 8), zeros(4, 8), zeros(6, 8)
    weights_at = (0, 1, 2 * BLOCK, 2 * BLOCK + 1)
    for pair in range(0, heads, 2):
        store(tops, 4 * pair, none)
        store(masses, 4 * pair, zeros(1, 8)[0])
    for c in range(out_at[0], out_at[0] + heads * latent, 8):
        store(out, c, zeros(1, 8)[0])
    base = layer * shape.slots * width
    for start in range(first_key, last_key, BLOCK):
        num = min(BLOCK, last_key - start)
        turn = (start - first_key) // BLOCK % 2
        key_at, next_at = places[turn * BLOCK :], places[(1 - turn) * BLOCK :]
        if start == first_key:
            _find(shape, buffers.pages, row, start, last_key, base, key_at)
        # What is read next: the following block, or that of the next row.
        if start + BLOCK < last_key:
            _find(shape, buffers.pages, row, start + BLOCK, last_key, base, next_at)
        else:
            last_of_next = buffers.positions[next_row]
            _find(shape, buffers.pages, next_row, 0, last_of_next, base, next_at)
        for pair in range(0, heads, 2):
            pair_at = offsets(two, query_at, pair)
            own = pair * BLOCK
            for i in range(0, num, 6):
                at, ahead = offsets(six, key_at, i), offsets(six, next_at, i)
                sums = zeros(12, 8)
                for c in range(8 * pair, width, 8 * heads):  # each pair fetches its share
                    prefetch_rows(six, kv, ahead, c)
                for c in range(0, width, 8):
                    sums = multiply_add_pairs(sums, query, pair_at, kv, at, c)
                store_totals(scores, own + 2 * i, sums)
            if num < BLOCK:
                store(scores, own + 2 * num, none)
        # Four keys of two heads in a vector.
        for pair in range(0, heads, 2):
            own, end = pair * BLOCK, pair * BLOCK + 2 * num
            before = load(tops, 4 * pair, 8)
            top = before
            for i in range(own, end, 8):
                top = maximum(top, load(scores, i, 8))
            top = highest_of_parity(top)
            shrink = exponential(multiply(subtract(before, top), scale))
            mass = multiply(load(masses, 4 * pair, 8), shrink)
            for i in range(own, end, 8):
                weight = exponential(multiply(subtract(load(scores, i, 8), top), scale))
                mass = add(mass, weight)
                store(scores, i, weight)
            store(tops, 4 * pair, top)
            store(masses, 4 * pair, mass)
            store(shrinks, pair, shrink)
        for group in range(0, heads, GROUP):
            group_at = offsets(four, out_at, group)
            for c in range(0, latent, 16):
                sums = multiply_rows(zeros(4, 16), out, group_at, c, shrinks, group)
                for i in range(num):
                    value = load(kv, key_at[i] + c, 16)
                    at_weight = group * BLOCK + 2 * i
                    sums = multiply_add_rows(sums, scores, weights_at, at_weight, value)
                store_rows(out, group_at, c, sums)
    for head in range(heads):
        lane = 8 * (head // 2) + head % 2
        stats[part * 2 * heads + head] = tops[lane] * shape.softmax_scale
        stats[(part * 2 + 1) * heads + head] = (
            masses[lane] + masses[lane + 2] + masses[lane + 4] + masses[lane + 6]
        )


@compiled
def _merge(shape: Shape, buffers: Buffers, row: int, head: int, num_parts: int) -> None:
    """Divide by the sum of the weights, and join the parts of one row and head in the first."""
    heads, latent = shape.heads, shape.latent
    stats, parts = buffers.stats, buffers.parts
    top, mass = np.float32(-1e30), np.float32(0.0)
    for part in range(row * num_parts, (row + 1) * num_parts):
        top = max(top, stats[part * 2 * heads + head])
    for part in range(row * num_parts, (row + 1) * num_parts):
        shrink = math.exp(stats[part * 2 * heads + head] - top)
        mass += shrink * stats[(part * 2 + 1) * heads + head]
    target = (row * num_parts * heads + head) * latent
    for part in range(row * num_parts, (row + 1) * num_parts):
        factor = np.float32(math.exp(stats[part * 2 * heads + head] - top) / mass)
        scale = splat(zeros(1, 16)[0], factor)
        source = (part * heads + head) * latent
        for c in range(0, latent, 16):
            value = multiply(load(parts, source + c, 16), scale)
            if source != target:
                value = add(value, load(parts, target + c, 16))
            store(parts, target + c, value)


@compiled
def _route(
    shape: Shape,
    num_rows: int,
    scores: Floats,
    bias: Floats,
    bias_at: int,
    weights: Floats,
    row_of: Integers,
    ends: Integers,
    chosen: Integers,
) -> None:
    """Choose experts as ``Router`` does; lay out the rows expert by expert, the shared one last.

    ``scores`` [B, E padded] holds the router's products. Of each of the C places: ``row_of`` and
    ``weights``; ``ends`` [E + 1] are the ends of the experts' places.
    """
    experts, padded = shape.experts, (shape.experts + TILE - 1) // TILE * TILE
    one = splat(zeros(1, 16)[0], np.float32(1.0))
    for expert in range(experts):
        ends[expert] = 0
    for row in range(num_rows):
        base = row * padded
        for c in range(base, base + padded, 16):
            negated = subtract(zeros(1, 16)[0], load(scores, c, 16))
            store(scores, c, divide(one, add(one, exponential(negated))))
        mass = np.float32(0.0)
        for k in range(shape.chosen):
            best, best_score = -1, np.float32(-np.inf)
            for expert in range(experts):
                score = scores[base + expert] + bias[bias_at + expert]
                if score > best_score:
                    is_new = True
                    for earlier in range(k):
                        is_new = is_new and chosen[row * shape.chosen + earlier] != expert
                    if is_new:
                        best, best_score = expert, score
            chosen[row * shape.chosen + k] = best
            mass += scores[base + best]
            ends[best] += 1
        for k in range(shape.chosen):
            place = row * shape.chosen + k
            scale = shape.routed_scale / (mass + 1e-20)
            weights[num_rows * (shape.chosen + 1) + place] = scores[base + chosen[place]] * scale
    end = 0
    for expert in range(experts):
        count = ends[expert]
        ends[expert] = end  # its start, until it is filled
        end += count
    for place in range(num_rows * shape.chosen):
        expert = chosen[place]
        row_of[ends[expert]] = place // shape.chosen
        weights[ends[expert]] = weights[num_rows * (shape.chosen + 1) + place]
        ends[expert] += 1
    for row in range(num_rows):
        row_of[end + row] = row
        weights[end + row] = 1.0
    ends[experts] = end + num_rows


@compiled
def _pick(shape: Shape, buffers: Buffers, row: int) -> None:
    """The most likely id of a row and its log-probability under the plain softmax."""
    logits, padded = buffers.logits, (shape.vocabulary + TILE - 1) // TILE * TILE
    base = row * padded
    whole = base + shape.vocabulary // 16 * 16
    stop = base + shape.vocabulary
    top = np.float32(-np.inf)
    if whole > base:
        tops = load(logits, base, 16)
        for c in range(base, whole, 16):
            tops = maximum(tops, load(logits, c, 16))
        top = highest(tops)
    for c in range(whole, stop):
        top = max(top, logits[c])
    sums = zeros(1, 16)[0]
    tops = splat(sums, top)
    for c in range(base, whole, 16):
        sums = add(sums, exponential(subtract(load(logits, c, 16), tops)))
    mass = float(total(sums))
    for c in range(whole, stop):
        mass += math.exp(logits[c] - top)
    best = base
    while logits[best] != top and best < stop - 1:
        best += 1
    buffers.best[row] = best - base
    buffers.logprobs[row] = -math.log(mass)


@inlined
def _step(
    shape: Shape, w: Any, vectors: Floats, table: Any, b: Buffers, thread: int, num_threads: int
) -> None:
    """Compute one token of each row: this thread's share."""
    num = b.control[NUM_ROWS]
    hidden, heads, latent, q_rank = shape.hidden, shape.heads, shape.latent, shape.q_rank
    width = latent + shape.rope
    num_places = num * (shape.chosen + 1)
    # This thread's own: normed rows, scores of the router, gates and ups, what attention needs.
    private = b.private[thread]
    places = b.places[thread]
    normed = private[: num * hidden]
    own = private[num * hidden :]
    router_width = (shape.experts + TILE - 1) // TILE * TILE
    router = own[: num * router_width]
    weights = own[num * router_width :][: 2 * num_places]
    gate_up = own[num * router_width + 2 * num_places :]
    x_at, y_at = places[:num_places], places[num_places : 2 * num_places]
    row_of, z_at = places[2 * num_places : 3 * num_places], places[3 * num_places : 4 * num_places]
    chosen, ends = places[4 * num_places : 5 * num_places], places[5 * num_places :]
    num_parts = 1 if num >= 2 * num_threads else num_threads

    start, stop = _share(num, thread, num_threads)
    for row in range(start, stop):
        for c in range(0, hidden, 16):
            store(b.x, row * hidden + c, load(b.embedding, b.ids[row] * hidden + c, 16))
    wait_for_all(b.control, BARRIER, num_threads)

    for layer in range(shape.layers):
        at = table[layer]
        # -> queries and the key before their norms
        _norm(b.x, 0, hidden, num, hidden, vectors, at[INPUT_NORM], shape.eps, normed, 0, hidden)
        _lay(x_at, 0, hidden, num)
        _lay(y_at, 0, shape.a_padded, num)
        start, stop = _share(shape.a_padded // TILE, thread, num_threads)
        first_head, last_head = _share(heads, thread, num_threads)
        q_rows, key_rows = shape.q_padded // TILE * q_rank, latent // TILE * shape.nope
        value_rows = shape.value_padded // TILE * latent
        ahead = at[Q_B] + first_head * q_rows
        _tiles(w, at[QKV_A], hidden, start, stop, normed, x_at, b.a, y_at, num, STORE, ahead)
        wait_for_all(b.control, BARRIER, num_threads)

        # -> the key, stored in its page; queries over latents, by heads
        start, stop = _share(num, thread, num_threads)
        for row in range(start, stop):
            position = b.positions[row]
            page = b.pages[row * shape.pages + position // shape.page_size]
            slot = page * shape.page_size + position % shape.page_size
            key = (layer * shape.slots + slot) * width
            source = row * shape.a_padded + q_rank
            _norm(b.a, source, 0, 1, latent, vectors, at[LATENT_NORM], shape.eps, b.kv, key, 0)
            _rotate(
                b.a,
                source + latent,
                b.rotation,
                position * shape.rope,
                shape.rope,
                b.kv,
                key + latent,
            )
        _norm(
            b.a, 0, shape.a_padded, num, q_rank, vectors, at[Q_NORM], shape.eps, normed, 0, q_rank
        )
        _lay(x_at, 0, q_rank, num)
        for head in range(first_head, last_head):
            _lay(y_at, head * shape.q_padded, heads * shape.q_padded, num)
            _lay(z_at, head * shape.key_padded, heads * shape.key_padded, num)
            w_row, ahead = at[Q_B] + head * q_rows, at[W_UK] + head * key_rows
            tiles = shape.q_padded // TILE
            _tiles(w, w_row, q_rank, NONE, tiles, normed, x_at, b.q, y_at, num, STORE, ahead)
            w_row, ahead, tiles = ahead, w_row + q_rows, latent // TILE
            _tiles(w, w_row, shape.nope, NONE, tiles, b.q, y_at, b.q_key, z_at, num, STORE, ahead)
            for row in range(num):
                _rotate(
                    b.q,
                    y_at[row] + shape.nope,
                    b.rotation,
                    b.positions[row] * shape.rope,
                    shape.rope,
                    b.q_key,
                    z_at[row] + latent,
                )
        wait_for_all(b.control, BARRIER, num_threads)

        # -> sums of latents: whoever is free takes the next row, or part of one
        part = take_ticket(b.control, ATTENTION + layer)
        while part < num * num_parts:
            row = part // num_parts
            first, last = _share(int(b.positions[row]) + 1, part % num_parts, num_parts)
            next_row = min(row + num_threads, num - 1)
            _attend(shape, b, layer, row, first, last, part, next_row, own, places)
            part = take_ticket(b.control, ATTENTION + layer)
        wait_for_all(b.control, BARRIER, num_threads)

        # -> values, by heads
        depth = heads * shape.value_padded
        start, stop = _share(hidden // TILE, thread, num_threads)
        for head in range(first_head, last_head):
            for row in range(num):
                _merge(shape, b, row, head, num_parts)
            _lay(x_at, head * latent, num_parts * heads * latent, num)
            _lay(y_at, head * shape.value_padded, heads * shape.value_padded, num)
            w_row, tiles = at[W_UV] + head * value_rows, shape.value_padded // TILE
            is_last = head + 1 == last_head
            ahead = at[OUT] + start * depth if is_last else w_row + value_rows
            _tiles(w, w_row, latent, NONE, tiles, b.parts, x_at, b.value, y_at, num, STORE, ahead)
        wait_for_all(b.control, BARRIER, num_threads)

        # -> x += attention
        experts = at[NUM_EXPERTS]
        _lay(x_at, 0, depth, num)
        _lay(y_at, 0, hidden, num)
        ahead = at[ROUTER] if experts else at[SHARED_GATE_UP]
        _tiles(w, at[OUT], depth, start, stop, b.value, x_at, b.x, y_at, num, ADD, ahead)
        wait_for_all(b.control, BARRIER, num_threads)

        # -> gates and ups of every expert that was chosen; each thread routes for itself
        _norm(b.x, 0, hidden, num, hidden, vectors, at[POST_NORM], shape.eps, normed, 0, hidden)
        _lay(x_at, 0, hidden, num)
        if experts:
            _lay(y_at, 0, router_width, num)
            tiles, ahead = router_width // TILE, at[GATE_UP]
            _tiles(
                w, at[ROUTER], hidden, NONE, tiles, normed, x_at, router, y_at, num, STORE, ahead
            )
            _route(shape, num, router, vectors, at[BIAS], weights, row_of, ends, chosen)
            for place in range(num_places):
                x_at[place] = row_of[place] * hidden
        else:
            ends[0] = num
            for row in range(num):
                weights[row] = 1.0
        num_inner = ends[experts]
        _lay(y_at, 0, 2 * TILE, num_inner)
        # Rows of inner values end to end: of routed experts, then of the shared one.
        shared_inner = at[SHARED_INNER]
        first = 0
        for expert in range(experts + 1):
            inner = shape.inner if expert < experts else shared_inner
            base = ends[experts - 1] * shape.inner if expert == experts and experts else 0
            start, stop = _share(inner // TILE, thread, num_threads)
            size = 2 * inner // TILE * hidden
            w_start = at[SHARED_GATE_UP]
            w_next = at[DOWN] if experts else at[SHARED_DOWN]
            if expert < experts:
                w_start = at[GATE_UP] + expert * size
                is_last = expert + 1 == experts
                w_next = (at[SHARED_GATE_UP] if is_last else w_start + size) + 2 * start * hidden
            count = ends[expert] - first
            if count:
                for tile in range(start, stop):
                    w_row = w_start + 2 * tile * hidden
                    ahead = w_row + 2 * hidden if tile + 1 < stop else w_next
                    here, there = x_at[first:], y_at[first:]
                    _tiles(
                        w,
                        w_row,
                        hidden,
                        NONE,
                        PAIR,
                        normed,
                        here,
                        gate_up,
                        there,
                        count,
                        STORE,
                        ahead,
                    )
                    for place in range(first, ends[expert]):
                        gate = load(gate_up, y_at[place], 16)
                        up = load(gate_up, y_at[place] + TILE, 16)
                        one = splat(gate, np.float32(1.0))
                        divisor = add(one, exponential(subtract(zeros(1, 16)[0], gate)))
                        value = multiply(divide(gate, divisor), up)
                        value = multiply(value, splat(gate, weights[place]))
                        row = place if expert < experts else place - first
                        store(b.inner, base + row * inner + tile * TILE, value)
            first = ends[expert]
        wait_for_all(b.control, BARRIER, num_threads)

        # -> x += the experts' outputs
        for place in range(num_inner):
            x_at[place] = place * shape.inner
            y_at[place] = row_of[place] * hidden
        first = ends[experts - 1] if experts else 0
        _lay(x_at[first:], first * shape.inner, shared_inner, num)
        _lay(y_at[first:], 0, hidden, num)
        start, stop = _share(hidden // TILE, thread, num_threads)
        first = 0
        for expert in range(experts + 1):
            depth = shape.inner if expert < experts else shared_inner
            w_start = at[SHARED_DOWN]
            ahead = table[layer + 1][QKV_A] if layer + 1 < shape.layers else shape.head
            if expert < experts:
                w_start = at[DOWN] + expert * (hidden // TILE) * depth
                is_last = expert + 1 == experts
                ahead = at[SHARED_DOWN] if is_last else w_start + hidden // TILE * depth
                ahead += start * depth
            here, there = x_at[first:], y_at[first:]
            count = ends[expert] - first
            _tiles(w, w_start, depth, start, stop, b.inner, here, b.x, there, count, ADD, ahead)
            first = ends[expert]
        wait_for_all(b.control, BARRIER, num_threads)

    _norm(b.x, 0, hidden, num, hidden, vectors, shape.head_norm, shape.eps, normed, 0, hidden)
    padded = (shape.vocabulary + TILE - 1) // TILE * TILE
    _lay(x_at, 0, hidden, num)
    _lay(y_at, 0, padded, num)
    start, stop = _share(padded // TILE, thread, num_threads)
    ahead = table[0][QKV_A]
    _tiles(w, shape.head, hidden, start, stop, normed, x_at, b.logits, y_at, num, STORE, ahead)
    wait_for_all(b.control, BARRIER, num_threads)
    start, stop = _share(num, thread, num_threads)
    for row in range(start, stop):
        _pick(shape, b, row)
    wait_for_all(b.control, BARRIER, num_threads)


@compiled
def post(shape: Shape, b: Buffers) -> int:
    """Announce a step to all threads, which see what was written before; returns its number."""
    for layer in range(shape.layers):
        b.control[ATTENTION + layer] = 0
    number: int = take_ticket(b.control, POSTED) + 1
    return number


@compiled
def run(
    shape: Shape,
    w: Any,
    vectors: Floats,
    table: Any,
    b: Buffers,
    thread: int,
    num_threads: int,
    seen: int,
    patience: int,
) -> int:
    """Take part in every step after number ``seen``.

    Returns the last one when ``patience`` looks have found no other.
    """
    spins = 0
    while spins <= patience:
        if look(b.control, POSTED) > seen:
            _step(shape, w, vectors, table, b, thread, num_threads)
            seen += 1
            spins = 0
        else:
            spins += 1
            if spins % 64 == 0:
                offer_core()
    return seen
