"""Short vectors of float32 for numba: what a compiler's vectoriser may miss is written out.

    zeros(6, 16) ── multiply_add(acc, x, at, k, w_k) ── … ── store_rows(y, at, column, acc)

A ``Vector`` is LLVM's ``<n x float>``, so the same source gives AVX-512, AVX2, SSE or NEON. Tuples
of vectors are the accumulators of a small matrix product: they live in registers. Arrays are flat
and indexed by plain offsets, without bounds checks.

The barrier between threads is here as well: a ticket counter that is spun on.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import models, register_model

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = TypeVar("Function", bound=Callable[..., Any])

PATIENCE_SPINS = 2_000
"""Looks at a barrier before the core is offered to others between them."""
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_POLYNOMIAL = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
"""Taylor's, for |x| <= ln 2 / 2: the first term left out is below 6e-9."""
EXP_RANGE = (-87.0, 88.0)

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def compiled(function: Function) -> Function:
    """Compile for this processor when first called, without the GIL; kept for later processes.

    Kept beside the source, else in the user's cache, else in ``NUMBA_CACHE_DIR``; where none of
    them can be written, every process compiles anew, and a warning says so.
    """
    try:
        return cast("Function", njit(cache=True, **_OPTIONS)(function))
    except RuntimeError:  # numba's word for "no place can be written"
        _say_that_nothing_is_kept()
        return cast("Function", njit(**_OPTIONS)(function))


@cache
def _say_that_nothing_is_kept() -> None:
    logging.getLogger(__name__).warning(
        "the compiled decoding step cannot be kept, so each process compiles it again: set "
        "NUMBA_CACHE_DIR to a folder that can be written"
    )


def inlined(function: Function) -> Function:
    """Make a function a part of each that calls it: for large ones that one other calls."""
    return cast("Function", njit(inline="always", **_OPTIONS)(function))


def intrinsic(function: Any = None, **options: Any) -> Any:
    """Numba's decorator: typed as what it makes, not as what it is given."""
    return numba_intrinsic(function, **options) if function else numba_intrinsic(**options)


class Vector(types.Type):
    """``lanes`` numbers of float32 in registers."""

    def __init__(self, lanes: int) -> None:
        self.lanes: int = lanes
        super().__init__(name=f"Vector({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, _llvm(kind.lanes))


def _llvm(lanes: int) -> ir.VectorType:
    return ir.VectorType(_FLOAT, lanes)


def _constant(lanes: int, value: float, scalar: ir.Type = _FLOAT) -> ir.Constant:
    return ir.Constant(ir.VectorType(scalar, lanes), [value] * lanes)


def _pointer(context: Any, builder: Any, array: Any, value: Any, index: Any, to: Any) -> Any:
    """Address of ``array[index]`` as a pointer to ``to``."""
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    vector = builder.insert_element(_constant(lanes, 0.0), scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(vector, vector, _constant(lanes, 0, _INT32))


def _call(builder: Any, name: str, kind: ir.Type, *args: Any) -> Any:
    function_type = ir.FunctionType(kind, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    lanes = a.type.count
    return _call(builder, f"llvm.fmuladd.v{lanes}f32", a.type, a, b, c)


@intrinsic(prefer_literal=True)
def zeros(typing: Any, rows: Any, lanes: Any) -> Any:
    """Return a tuple of ``rows`` vectors of zeros."""
    result = types.UniTuple(Vector(lanes.literal_value), rows.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [_constant(lanes.literal_value, 0.0)] * rows.literal_value
        return context.make_tuple(builder, signature.return_type, values)

    return result(rows, lanes), generate


@intrinsic
def offsets(typing: Any, like: Any, at: Any, first: Any) -> Any:
    """Return ``at[first], at[first + 1] …``, as many as ``like`` has vectors."""
    result = types.UniTuple(types.int64, like.count)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, at, args[1], args[2], _INT64)
        values = [
            builder.load(builder.gep(pointer, [ir.Constant(_INT64, row)]))
            for row in range(like.count)
        ]
        return context.make_tuple(builder, signature.return_type, values)

    return result(like, at, types.int64), generate


@intrinsic
def multiply_add_rows(typing: Any, sums: Any, x: Any, at: Any, k: Any, w: Any) -> Any:
    """Return ``sums[r] + x[at[r] + k] * w`` for all r."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums_, x_, at_, k_, w_ = args
        rows = zip(
            cgutils.unpack_tuple(builder, sums_), cgutils.unpack_tuple(builder, at_), strict=True
        )
        values = []
        for total, place in rows:
            index = builder.add(place, k_)
            scalar = builder.load(_pointer(context, builder, x, x_, index, _FLOAT))
            values.append(_multiply_add(builder, _splat(builder, scalar, w.lanes), w_, total))
        return context.make_tuple(builder, signature.return_type, values)

    return sums(sums, x, at, types.int64, w), generate


@intrinsic
def multiply_add_pairs(typing: Any, sums: Any, x: Any, x_at: Any, y: Any, y_at: Any, k: Any) -> Any:
    """Return ``sums[i, j] + x[x_at[j] + k :] * y[y_at[i] + k :]`` for all i and j, j innermost."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums_, x_, x_at_, y_, y_at_, k_ = args
        kind = _llvm(sums.dtype.lanes)
        xs, ys = (
            [
                builder.load(
                    _pointer(context, builder, array, value, builder.add(place, k_), kind), align=4
                )
                for place in cgutils.unpack_tuple(builder, at)
            ]
            for array, value, at in ((x, x_, x_at_), (y, y_, y_at_))
        )
        pairs = [(a, b) for b in ys for a in xs]
        values = [
            _multiply_add(builder, a, b, total)
            for (a, b), total in zip(pairs, cgutils.unpack_tuple(builder, sums_), strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, values)

    return sums(sums, x, x_at, y, y_at, types.int64), generate


@intrinsic
def store_totals(typing: Any, y: Any, index: Any, sums: Any) -> Any:
    """Write the total of each vector: ``y[index + r] = sum of the lanes of sums[r]``.

    Four at a time: halves are added across pairs of vectors until one vector holds four totals.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y_, index_, sums_ = args
        values, lanes = cgutils.unpack_tuple(builder, sums_), sums.dtype.lanes

        def fold(a: Any, b: Any, places: list[int], others: list[int]) -> Any:
            return builder.fadd(
                *(
                    builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(p)), p))
                    for p in (places, others)
                )
            )

        starts = [i + b for i in range(0, lanes, 4) for b in (0, lanes)]
        even = [place for start in starts for place in (start, start + 2)]
        odd = [place + 1 for place in even]
        for start in range(0, sums.count, 4):
            a, b, c, d = values[start : start + 4]
            four = fold(fold(a, b, even, odd), fold(c, d, even, odd), even, odd)
            while four.type.count > 4:
                half = four.type.count // 2
                four = fold(four, four, list(range(half)), list(range(half, 2 * half)))
            place = builder.add(index_, ir.Constant(_INT64, start))
            builder.store(four, _pointer(context, builder, y, y_, place, _llvm(4)), align=4)
        return context.get_dummy_value()

    return types.void(y, types.int64, sums), generate


@intrinsic
def multiply_rows(
    typing: Any, like: Any, x: Any, at: Any, column: Any, factors: Any, place: Any
) -> Any:
    """Return ``x[at[r] + column :] * factors[place + r]`` for as many r as ``like`` has vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, x_, at_, column_, factors_, place_ = args
        lanes = like.dtype.lanes
        pointer = _pointer(context, builder, factors, factors_, place_, _FLOAT)
        values = []
        for row, start in enumerate(cgutils.unpack_tuple(builder, at_)):
            index = builder.add(start, column_)
            value = builder.load(_pointer(context, builder, x, x_, index, _llvm(lanes)), align=4)
            factor = builder.load(builder.gep(pointer, [ir.Constant(_INT64, row)]))
            values.append(builder.fmul(value, _splat(builder, factor, lanes)))
        return context.make_tuple(builder, signature.return_type, values)

    return like(like, x, at, types.int64, factors, types.int64), generate


def _storing(*, is_added: bool) -> Any:
    def store(typing: Any, y: Any, at: Any, column: Any, values: Any) -> Any:
        kind = _llvm(values.dtype.lanes)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            y_, at_, column_, values_ = args
            rows = zip(
                cgutils.unpack_tuple(builder, at_),
                cgutils.unpack_tuple(builder, values_),
                strict=True,
            )
            for place, value in rows:
                pointer = _pointer(context, builder, y, y_, builder.add(place, column_), kind)
                before = builder.load(pointer, align=4) if is_added else None
                builder.store(builder.fadd(before, value) if is_added else value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(y, at, types.int64, values), generate

    return store


store_rows: Any = intrinsic(_storing(is_added=False))
add_rows: Any = intrinsic(_storing(is_added=True))


@intrinsic(prefer_literal=True)
def load(typing: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Return ``array[index : index + lanes]``."""
    result = Vector(lanes.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _llvm(result.lanes)
        return builder.load(_pointer(context, builder, array, args[0], args[1], kind), align=4)

    return result(array, types.int64, lanes), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write ``array[index : index + lanes] = value``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _llvm(value.lanes)
        pointer = _pointer(context, builder, array, args[0], args[1], kind)
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), generate


@intrinsic
def load_weights(typing: Any, packed: Any, row: Any) -> Any:
    """Return row ``row`` of 16 weights: float32 as it lies, or bfloat16 pairs in 8 words widened.

    Word i holds weight i in its lower half and weight i + 8 in its upper one; a bfloat16 is the
    upper half of the float32 of the same value.
    """
    is_wide = packed.dtype == types.float32

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _llvm(16) if is_wide else ir.VectorType(_INT32, 8)
        index = builder.mul(args[1], ir.Constant(_INT64, 16 if is_wide else 8))
        value = builder.load(_pointer(context, builder, packed, args[0], index, kind), align=4)
        if is_wide:
            return value
        low = builder.shl(value, _constant(8, 16, _INT32))
        high = builder.and_(value, _constant(8, 0xFFFF0000, _INT32))
        halves = [builder.bitcast(half, _llvm(8)) for half in (low, high)]
        return builder.shuffle_vector(
            *halves, ir.Constant(ir.VectorType(_INT32, 16), list(range(16)))
        )

    return Vector(16)(packed, types.int64), generate


def _prefetch(builder: Any, pointer: Any) -> None:
    hints = [ir.Constant(_INT32, hint) for hint in (0, 3, 1)]  # to read, into all caches, data
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *hints)


@intrinsic
def prefetch_rows(typing: Any, like: Any, array: Any, at: Any, column: Any) -> Any:
    """Fetch the cache line of ``array[at[r] + column]`` for as many r as ``like`` has vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for place in cgutils.unpack_tuple(builder, args[2]):
            index = builder.add(place, args[3])
            _prefetch(builder, _pointer(context, builder, array, args[1], index, ir.IntType(8)))
        return context.get_dummy_value()

    return types.void(like, array, at, types.int64), generate


@intrinsic
def prefetch_weights(typing: Any, packed: Any, row: Any) -> Any:
    """Fetch the cache line of a row of weights; it may lie beyond the end."""
    words = 16 if packed.dtype == types.float32 else 8

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = builder.mul(args[1], ir.Constant(_INT64, words))
        _prefetch(builder, _pointer(context, builder, packed, args[0], index, ir.IntType(8)))
        return context.get_dummy_value()

    return types.void(packed, types.int64), generate


@intrinsic
def splat(typing: Any, like: Any, scalar: Any) -> Any:
    """Return ``scalar`` in every lane, as many as ``like`` has."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[1], like.lanes)

    return like(like, types.float32), generate


@intrinsic
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _multiply_add(builder, *args)

    return a(a, b, c), generate


def _binary(operation: Callable[[Any, Any, Any], Any]) -> Any:
    def binary(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return operation(builder, *args)

        return a(a, b), generate

    return intrinsic(binary)


add: Any = _binary(lambda builder, a, b: builder.fadd(a, b))
subtract: Any = _binary(lambda builder, a, b: builder.fsub(a, b))
multiply: Any = _binary(lambda builder, a, b: builder.fmul(a, b))
divide: Any = _binary(lambda builder, a, b: builder.fdiv(a, b))
maximum: Any = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


def _reduction(step: Callable[[Any, Any, Any], Any]) -> Any:
    def reduce(typing: Any, a: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            (value,) = args
            lanes = a.lanes
            while lanes > 1:
                lanes //= 2
                halves = [
                    builder.shuffle_vector(
                        value, value, ir.Constant(ir.VectorType(_INT32, lanes), places)
                    )
                    for places in (list(range(lanes)), list(range(lanes, 2 * lanes)))
                ]
                value = step(builder, *halves)
            return builder.extract_element(value, ir.Constant(_INT32, 0))

        return types.float32(a), generate

    return intrinsic(reduce)


total: Any = _reduction(lambda builder, a, b: builder.fadd(a, b))
highest: Any = _reduction(
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)
)


@intrinsic
def highest_of_parity(typing: Any, a: Any) -> Any:
    """Return in each lane the highest of all lanes of ``a`` that are even, or odd, as it is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value,), distance = args, 2
        while distance < a.lanes:
            places = [lane ^ distance for lane in range(a.lanes)]
            other = builder.shuffle_vector(
                value, value, ir.Constant(ir.VectorType(_INT32, a.lanes), places)
            )
            value = builder.select(builder.fcmp_ordered(">", value, other), value, other)
            distance *= 2
        return value

    return a(a), generate


@intrinsic
def exponential(typing: Any, a: Any) -> Any:
    """Return ``exp(a)`` to 1e-7 of its value; beyond ``EXP_RANGE`` that of its end."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x,), lanes = args, a.lanes

        def constant(value: float) -> Any:
            return _constant(lanes, value)

        lowest, highest_ = map(constant, EXP_RANGE)
        x = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
        x = builder.select(builder.fcmp_ordered("<", x, highest_), x, highest_)
        # exp(x) = 2**n * exp(rest), rest = x - n ln 2
        n = _call(builder, f"llvm.rint.v{lanes}f32", x.type, builder.fmul(x, constant(LOG2_E)))
        rest = _multiply_add(builder, n, constant(-LN2_HIGH), x)
        rest = _multiply_add(builder, n, constant(-LN2_LOW), rest)
        value = constant(EXP_POLYNOMIAL[0])
        for factor in EXP_POLYNOMIAL[1:]:
            value = _multiply_add(builder, value, rest, constant(factor))
        integers = ir.VectorType(_INT32, lanes)
        exponent = builder.add(builder.fptosi(n, integers), _constant(lanes, 127, _INT32))
        power = builder.bitcast(builder.shl(exponent, _constant(lanes, 23, _INT32)), x.type)
        return builder.fmul(value, power)

    return a(a), generate


@intrinsic
def stay_apart(typing: Any) -> Any:
    """Keep the function that calls this a function of its own, compiled once for all callers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def take_ticket(typing: Any, counters: Any, index: Any) -> Any:
    """Add 1 to a counter that threads share; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, counters, args[0], args[1], _INT64)
        return builder.atomic_rmw("add", pointer, ir.Constant(_INT64, 1), "seq_cst")

    return types.int64(counters, types.int64), generate


@intrinsic
def look(typing: Any, counters: Any, index: Any) -> Any:
    """Read a counter that threads share."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, counters, args[0], args[1], _INT64)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(counters, types.int64), generate


@intrinsic
def offer_core(typing: Any) -> Any:
    """Let the system run another thread on this core."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, name, _INT32)
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def wait_for_all(counters: Any, index: int, num_threads: int) -> None:
    """Return when all threads have called this as often; every write before it is seen after."""
    ticket = take_ticket(counters, index)
    last = (ticket // num_threads + 1) * num_threads
    spins = 0
    while look(counters, index) < last:
        spins += 1
        if spins > PATIENCE_SPINS:
            offer_core()
