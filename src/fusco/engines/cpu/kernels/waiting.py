"""Waiting for other processes: flags in shared memory, and sleep until one changes (futex)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusco.engines.cpu import futex
from fusco.engines.cpu.kernels.compiling import inner, kernel
from fusco.engines.cpu.kernels.memory import collect
from fusco.layout.blocks import Floats, Ints

_NUM_NAPS = 5
_NAP_NS = 10_000_000
"""After so many naps a wait returns, since Python handles signals and asks who has died."""

COME, SLEPT = -1, -2
"""How a wait ends, unless a rank has not come."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_CLOCK_MONOTONIC = 1


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
def _wake(typing_context: Any, address: Any) -> Any:
    """Wake everybody who sleeps on the int32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _futex(builder, args[0], futex.WAKE, _I64(2**31 - 1), _I64(0))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _sleep(typing_context: Any, address: Any, seen: Any, nap_ns: Any) -> Any:
    """Sleep while the int32 at an address is `seen`, less than a second; may wake early."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, seen, nap_ns = args
        bound = cgutils.alloca_once_value(builder, ir.Constant(ir.ArrayType(_I64, 2), [0, 0]))
        builder.store(nap_ns, cgutils.gep_inbounds(builder, bound, 0, 1))
        value = builder.zext(seen, _I64)
        _futex(builder, address, futex.WAIT, value, builder.ptrtoint(bound, _I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int32, types.int64), generate


@intrinsic
def _now_s(typing_context: Any) -> Any:
    """`time.monotonic()`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        now = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        kind = ir.FunctionType(_I32, [_I32, now.type])
        clock = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(clock, [_I32(_CLOCK_MONOTONIC), now])
        seconds, nanoseconds = (
            builder.sitofp(builder.load(cgutils.gep_inbounds(builder, now, 0, i)), ir.DoubleType())
            for i in range(2)
        )
        return builder.fadd(seconds, builder.fmul(nanoseconds, ir.Constant(ir.DoubleType(), 1e-9)))

    return types.float64(), generate


def _futex(builder: Any, address: Any, operation: int, value: Any, bound: Any) -> None:
    kind = ir.FunctionType(_I64, [_I64], var_arg=True)
    call = cgutils.get_or_insert_function(builder.module, kind, "syscall")
    nothing = _I64(0)
    builder.call(
        call, [_I64(futex.number()), address, _I64(operation), value, bound, nothing, nothing]
    )


@kernel
def publish(flag: int, value: int) -> None:
    """Set the int32 at an address and wake who waits for it; whoever sees it sees every earlier
    store of this thread."""
    # Streamed stores are weakly ordered: a release store alone does not wait for them.
    _fence()
    _store(flag, value)
    _wake(flag)


@inner
def wrapped_difference(left: int, right: int) -> int:
    """`left - right` in int32, where counters wrap around."""
    return (left - right + 2**31) % 2**32 - 2**31


@kernel
def look(flag: int) -> int:
    """The int32 at an address."""
    return _load(flag)


@inner
def _has_come(flag: int, value: int, num_tries: int) -> bool:
    for _ in range(num_tries):  # noqa: SIM110 - compiled
        if wrapped_difference(_load(flag), value) >= 0:
            return True
    return False


@kernel
def wait(flags: Ints, value: int, num_tries: int, waited: Floats) -> int:
    """Until all flags have come to `value`, or for a while.

    Values wrap around: a flag has come to one if their int32 difference is not negative.

    Args:
        flags: `[P]`, addresses.
        value: what each must come to.
        num_tries: how often to look before sleeping.
        waited: `[P]`, where to add up the seconds slept for each.

    Returns:
        `COME`: all have; `SLEPT`: that too, but it took sleep; else the first that has not come.
    """
    result = COME
    naps = _NUM_NAPS
    for i in range(flags.size):
        if _has_come(flags[i], value, num_tries):
            continue
        result = SLEPT
        begin = _now_s()
        while not _has_come(flags[i], value, 1):
            if naps == 0:
                waited[i] += _now_s() - begin
                return i
            naps -= 1
            seen = _load(flags[i])
            if wrapped_difference(seen, value) < 0:
                _sleep(flags[i], seen, _NAP_NS)
        waited[i] += _now_s() - begin
    return result


@kernel
def meet(flag: int, flags: Ints, value: int, num_tries: int, waited: Floats) -> int:
    """Come to `value` and `wait` for all others."""
    publish(flag, value)
    return wait(flags, value, num_tries, waited)


@kernel
def share(
    flag: int,
    flags: Ints,
    value: int,
    num_tries: int,
    waited: Floats,
    records: Ints,
    length: int,
    num_alike: int,
) -> Any:
    """Publish this rank's record and `collect` all.

    Args:
        flag: as in `meet`, as is what follows.
        records: `[P]`, addresses.
        length: of each, in int64.
        num_alike: so many of them should be the same on all ranks.

    Returns:
        as `wait`; the records `[P, length]`; whether they are alike.
    """
    behind = meet(flag, flags, value, num_tries, waited)
    if behind >= 0:
        return behind, np.empty((0, length), dtype=np.int64), False
    found, alike = collect(records, length, num_alike)
    return behind, found, alike
