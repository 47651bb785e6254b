"""Sleeping until another process changes a word of shared memory (Linux futex)."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable

_SYSCALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_WAIT, _WAKE = 0, 1
_EVERYBODY = 2**31 - 1


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def is_known_here() -> bool:
    """Whether the number of the system call is known for this processor."""
    return platform.machine() in _SYSCALL


def wait(address: int, seen: int, timeout_s: float) -> None:
    """Sleep while the int32 at `address` is `seen`, at most `timeout_s`; may wake early."""
    whole = int(timeout_s)
    bound = _TimeSpec(whole, int((timeout_s - whole) * 1e9))
    _syscall()(_number(), address, _WAIT, ctypes.c_int32(seen), ctypes.byref(bound), None, 0)


def wake(address: int) -> None:
    """Wake everybody who sleeps on `address`."""
    _syscall()(_number(), address, _WAKE, ctypes.c_int32(_EVERYBODY), None, None, 0)


@functools.cache
def _number() -> int:
    return _SYSCALL[platform.machine()]


@functools.cache
def _syscall() -> Callable[..., int]:
    function = ctypes.CDLL(None).syscall
    function.restype = ctypes.c_long
    function.argtypes = (
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
    )
    call: Callable[..., int] = function
    return call
