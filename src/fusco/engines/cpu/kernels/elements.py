"""Elements of every dtype that is summed, as numba sees them: float16 rows come as int16 and
bfloat16 rows as uint16, since numba has neither on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


def widen(value: Any) -> Any:
    """An element as float32, or float64 where it is one."""
    raise NotImplementedError("compiled code only")


def narrow(value: Any, like: Any) -> Any:
    """A float32 (float64) sum, rounded to nearest even as an element like `like`."""
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


@overload(widen)
def _widen(value: Any) -> Any:
    def from_bfloat16(value: Any) -> Any:
        return _float_of_bits(np.uint32(value) << np.uint32(16))

    def from_float16(value: Any) -> Any:
        return _float_of_half(value)

    def same(value: Any) -> Any:
        return value

    return {types.uint16: from_bfloat16, types.int16: from_float16}.get(value, same)


@overload(narrow)
def _narrow(value: Any, like: Any) -> Any:
    def to_bfloat16(value: Any, like: Any) -> Any:
        bits = _bits_of_float(value)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        return np.uint16(rounded) if value == value else np.uint16(0x7FC0)

    def to_float16(value: Any, like: Any) -> Any:
        return _half_of_float(value)

    def same(value: Any, like: Any) -> Any:
        return value

    return {types.uint16: to_bfloat16, types.int16: to_float16}.get(like, same)
