"""How loops are compiled: to be called from Python, or from other loops only."""

from __future__ import annotations

from numba import njit

kernel = njit(cache=True, nogil=True)
"""Runs without the interpreter's lock; numba keeps what it compiled on disk."""

inner = njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""A part of kernels: no time is spent on making it callable from Python."""
