"""The Linux call by which processes sleep until another changes a word of shared memory."""

from __future__ import annotations

import platform

_SYSCALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
WAIT, WAKE = 0, 1


def is_known_here() -> bool:
    """Whether the number of the system call is known for this processor."""
    return platform.machine() in _SYSCALL


def number() -> int:
    """The number of the system call on this processor."""
    return _SYSCALL[platform.machine()]
