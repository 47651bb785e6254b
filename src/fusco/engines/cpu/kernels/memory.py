"""Addresses, copies and ordering: the few things that numba has no words for."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusco.engines.cpu.kernels.compiling import inner, kernel
from fusco.layout.blocks import Ints

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_I32, 8)
_VECTOR_BYTES = 32
_STEP = 4 * _VECTOR_BYTES


@intrinsic
def _copy(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
    signature = types.void(types.int64, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, from_, num_bytes = args
        pointer = _I8.as_pointer()
        cgutils.raw_memcpy(
            builder, builder.inttoptr(to, pointer), builder.inttoptr(from_, pointer), num_bytes, 1
        )
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _stream(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy past the cache: a line that is written whole need not be read first."""
    signature = types.void(types.int64, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, from_, num_bytes = args
        one = builder.module.add_metadata([ir.Constant(_I32, 1)])
        pointer = _VECTOR.as_pointer()
        with cgutils.for_range(builder, builder.udiv(num_bytes, _I64(_STEP))) as loop:
            begin = builder.mul(loop.index, _I64(_STEP))
            offsets = [builder.add(begin, _I64(i * _VECTOR_BYTES)) for i in range(4)]
            values = [
                builder.load(builder.inttoptr(builder.add(from_, offset), pointer), align=1)
                for offset in offsets
            ]
            for offset, value in zip(offsets, values, strict=True):
                at = builder.inttoptr(builder.add(to, offset), pointer)
                store = builder.store(value, at, align=_VECTOR_BYTES)
                store.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _fence(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _load(typing_context: Any, address: Any) -> Any:
    signature = types.int32(types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.inttoptr(args[0], _I32.as_pointer())
        return builder.load_atomic(at, "acquire", 4)

    return signature, generate


@intrinsic
def _store(typing_context: Any, address: Any, value: Any) -> Any:
    signature = types.void(types.int64, types.int32)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.inttoptr(args[0], _I32.as_pointer())
        builder.store_atomic(args[1], at, "release", 4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def load_float(typing_context: Any, address: Any) -> Any:
    """The float32 at an address."""
    signature = types.float32(types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.FloatType().as_pointer()))

    return signature, generate


@kernel
def copy(target: int, source: int, num_bytes: int) -> None:
    """Copy between addresses that do not overlap, through the cache."""
    _copy(target, source, num_bytes)


@inner
def copy_row(target: int, source: int, num_bytes: int) -> None:
    """Copy a row that nobody reads soon, past the cache where its alignment allows it."""
    if target % _VECTOR_BYTES == 0 and num_bytes >= _STEP:
        streamed = num_bytes // _STEP * _STEP
        _stream(target, source, streamed)
        if streamed < num_bytes:
            _copy(target + streamed, source + streamed, num_bytes - streamed)
    else:
        _copy(target, source, num_bytes)


@kernel
def publish(flag: int, value: int) -> None:
    """Set the int32 at an address; whoever sees it sees every earlier store of this thread."""
    # Streamed stores are weakly ordered: a release store alone does not wait for them.
    _fence()
    _store(flag, value)


@kernel
def spin(flag: int, value: int, num_tries: int) -> int:
    """Look at the int32 at an address until it has come to `value`; the last value seen.

    Values wrap around: `seen` has come to `value` if their int32 difference is not negative.
    """
    seen = _load(flag)
    for _ in range(num_tries):
        if wrapped_difference(seen, value) >= 0:
            break
        seen = _load(flag)
    return seen


@kernel
def wrapped_difference(left: int, right: int) -> int:
    """`left - right` in int32, where counters wrap around."""
    return (left - right + 2**31) % 2**32 - 2**31


@kernel
def first_behind(flags: Ints, value: int, num_tries: int) -> int:
    """The first of several flags that has not come to `value` when each was looked at until it
    had or `num_tries` times; -1: all have."""
    for i in range(flags.size):
        if wrapped_difference(spin(flags[i], value, num_tries), value) < 0:
            return i
    return -1


@kernel
def collect(addresses: Ints, length: int, num_alike: int) -> tuple[Ints, bool]:
    """The int64 `[length]` at each address, and whether all begin with the same `num_alike`."""
    found = np.empty((addresses.size, length), dtype=np.int64)
    alike = True
    for i in range(addresses.size):
        _copy(found[i].ctypes.data, addresses[i], length * 8)
        for j in range(num_alike):
            alike &= found[i, j] == found[0, j]
    return found, alike
