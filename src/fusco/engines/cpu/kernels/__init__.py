"""Compiled loops (numba), one file a job."""
