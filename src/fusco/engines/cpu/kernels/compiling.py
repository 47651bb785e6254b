"""How loops are compiled: to be called from Python, or from other loops only."""

from __future__ import annotations

import warnings

from numba import njit

from fusco import env


def _can_keep() -> bool:
    """Whether numba finds a folder for what it compiles; it looks for one when it decorates."""

    def probe() -> None:
        pass

    try:
        njit(cache=True)(probe)
    except RuntimeError as error:
        warnings.warn(
            "the cpu engine's loops are compiled anew by every process, for they cannot be kept: "
            f"{error}; set {env.NUMBA_CACHE_DIR.name} to a folder that can be written",
            stacklevel=2,
        )
        return False
    return True


_CACHE = _can_keep()

kernel = njit(cache=_CACHE, nogil=True)
"""Runs without the interpreter's lock; numba keeps what it compiled on disk, if it can."""

inner = njit(cache=_CACHE, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""A part of kernels: no time is spent on making it callable from Python."""
