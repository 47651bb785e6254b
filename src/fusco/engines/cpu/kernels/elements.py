"""Sums of elements of every dtype, as numba sees them.

numba has no half precision on the CPU, so float16 rows come as int16, and bfloat16 rows as uint32
words of two elements where their width is even, else as uint16. A word becomes two floats by a
shift and a mask, which costs half of what widening 16-bit elements does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from fusco.engines.cpu.kernels.compiling import inner

_ZERO = np.float32(0)
_SHIFT, _HIGH = np.uint32(16), np.uint32(0xFFFF0000)


def accumulate(
    out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, two: bool, starts: bool, ends: bool
) -> None:
    """Add `u * a`, and if there are `two` also `v * b`, to a running sum.

    Products are rounded before they are added. A sum that `starts` begins at zero, which turns -0
    into 0; where it `ends`, `out` is the sum, rounded to nearest even.

    Args:
        out: `[n]`, elements; may not overlap the others.
        sums: `[n]`, float32 or float64; for words `[2 * n]`.
        a: `[n]`, elements.
        u: the weight of `a`, of the dtype of `sums`.
        b: `[n]`, elements; not looked at unless `two`.
        v: the weight of `b`.
        two: whether there are two.
        starts: whether the sum starts here.
        ends: whether it ends here.
    """
    raise NotImplementedError("compiled code only")


@overload(accumulate)
def _accumulate(
    out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, two: bool, starts: bool, ends: bool
) -> Any:
    def elements(
        out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, two: bool, starts: bool, ends: bool
    ) -> None:
        _accumulate_elements(out, sums, a, u, b, v, two, starts, ends)

    def words(
        out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, two: bool, starts: bool, ends: bool
    ) -> None:
        if starts and ends and two:
            _two_rows_of_words(out, a, u, b, v)
        elif starts and ends:
            _one_row_of_words(out, a, u)
        else:
            one, other, to = a.view(np.uint16), b.view(np.uint16), out.view(np.uint16)
            _accumulate_elements(to, sums, one, u, other, v, two, starts, ends)

    return words if a.dtype == types.uint32 else elements


def sum_four(
    out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, c: Any, w: Any, d: Any, z: Any, n: int
) -> None:
    """A whole sum of `n` rows, three or four, weighted like the two of `accumulate`."""
    raise NotImplementedError("compiled code only")


@overload(sum_four)
def _sum_four(
    out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, c: Any, w: Any, d: Any, z: Any, n: int
) -> Any:
    def elements(
        out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, c: Any, w: Any, d: Any, z: Any, n: int
    ) -> None:
        _accumulate_elements(out, sums, a, u, b, v, True, True, False)
        _accumulate_elements(out, sums, c, w, d, z, n == 4, False, True)

    def words(
        out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, c: Any, w: Any, d: Any, z: Any, n: int
    ) -> None:
        if n == 4:
            _four_rows_of_words(out, a, u, b, v, c, w, d, z)
        else:
            _three_rows_of_words(out, a, u, b, v, c, w)

    return words if a.dtype == types.uint32 else elements


@inner
def _accumulate_elements(
    out: Any, sums: Any, a: Any, u: Any, b: Any, v: Any, two: bool, starts: bool, ends: bool
) -> None:
    if starts and ends and two:
        _two_rows(out, a, u, b, v)
    elif starts and ends:
        _one_row(out, a, u)
    else:
        if starts:
            sums[: a.size] = 0
        if two:
            _add(sums, a, u)
            a, u = b, v
        if ends:
            _add_and_round(out, sums, a, u)
        else:
            _add(sums, a, u)


# One plain loop each, without a choice inside: the compiler makes vectors of these only.
@inner
def _one_row(out: Any, a: Any, u: Any) -> None:
    for i in range(a.size):
        out[i] = _narrow(_ZERO + u * _widen(a[i]), out[i])


@inner
def _two_rows(out: Any, a: Any, u: Any, b: Any, v: Any) -> None:
    for i in range(a.size):
        out[i] = _narrow((_ZERO + u * _widen(a[i])) + v * _widen(b[i]), out[i])


@inner
def _add(sums: Any, a: Any, u: Any) -> None:
    for i in range(a.size):
        sums[i] += u * _widen(a[i])


@inner
def _add_and_round(out: Any, sums: Any, a: Any, u: Any) -> None:
    for i in range(a.size):
        out[i] = _narrow(sums[i] + u * _widen(a[i]), out[i])


@inner
def _one_row_of_words(out: Any, a: Any, u: Any) -> None:
    for i in range(a.size):
        out[i] = _word(_ZERO + u * _low(a[i]), _ZERO + u * _high(a[i]))


@inner
def _two_rows_of_words(out: Any, a: Any, u: Any, b: Any, v: Any) -> None:
    for i in range(a.size):
        low = (_ZERO + u * _low(a[i])) + v * _low(b[i])
        high = (_ZERO + u * _high(a[i])) + v * _high(b[i])
        out[i] = _word(low, high)


@inner
def _three_rows_of_words(out: Any, a: Any, u: Any, b: Any, v: Any, c: Any, w: Any) -> None:
    for i in range(a.size):
        low = (_ZERO + u * _low(a[i])) + v * _low(b[i])
        high = (_ZERO + u * _high(a[i])) + v * _high(b[i])
        out[i] = _word(low + w * _low(c[i]), high + w * _high(c[i]))


@inner
def _four_rows_of_words(
    out: Any, a: Any, u: Any, b: Any, v: Any, c: Any, w: Any, d: Any, z: Any
) -> None:
    for i in range(a.size):
        low = ((_ZERO + u * _low(a[i])) + v * _low(b[i])) + w * _low(c[i])
        high = ((_ZERO + u * _high(a[i])) + v * _high(b[i])) + w * _high(c[i])
        out[i] = _word(low + z * _low(d[i]), high + z * _high(d[i]))


@inner
def _low(word: Any) -> Any:
    return _float_of_bits(word << _SHIFT)


@inner
def _high(word: Any) -> Any:
    return _float_of_bits(word & _HIGH)


@inner
def _word(low: Any, high: Any) -> Any:
    return (_bfloat16_bits(low) >> _SHIFT) | (_bfloat16_bits(high) & _HIGH)


@inner
def _bfloat16_bits(value: Any) -> Any:
    """A float rounded to bfloat16, in the upper half of its bits."""
    bits = _bits_of_float(value)
    odd = (bits >> _SHIFT) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd)
    return rounded if value == value else np.uint32(0x7FC00000)


def _widen(value: Any) -> Any:
    """An element as float32, or float64 where it is one."""
    raise NotImplementedError("compiled code only")


def _narrow(value: Any, like: Any) -> Any:
    """A sum rounded to an element like `like`."""
    raise NotImplementedError("compiled code only")


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of_float(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float_of_half(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _half_of_float(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@overload(_widen)
def _widen_by_type(value: Any) -> Any:
    def from_bfloat16(value: Any) -> Any:
        return _float_of_bits(np.uint32(value) << _SHIFT)

    def from_float16(value: Any) -> Any:
        return _float_of_half(value)

    def same(value: Any) -> Any:
        return value

    return {types.uint16: from_bfloat16, types.int16: from_float16}.get(value, same)


@overload(_narrow)
def _narrow_by_type(value: Any, like: Any) -> Any:
    def to_bfloat16(value: Any, like: Any) -> Any:
        return np.uint16(_bfloat16_bits(value) >> _SHIFT)

    def to_float16(value: Any, like: Any) -> Any:
        return _half_of_float(value)

    def same(value: Any, like: Any) -> Any:
        return value

    return {types.uint16: to_bfloat16, types.int16: to_float16}.get(like, same)
