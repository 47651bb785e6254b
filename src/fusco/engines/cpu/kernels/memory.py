"""Addresses and copies: the few things that numba has no words for."""

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
def collect(addresses: Ints, length: int, num_alike: int) -> tuple[Ints, bool]:
    """The int64 `[length]` at each address, and whether all begin with the same `num_alike`."""
    found = np.empty((addresses.size, length), dtype=np.int64)
    alike = True
    for i in range(addresses.size):
        _copy(found[i].ctypes.data, addresses[i], length * 8)
        for j in range(num_alike):
            alike &= found[i, j] == found[0, j]
    return found, alike
