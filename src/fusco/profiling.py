"""Names for `torch.profiler`, at no cost while nobody looks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


def stage(name: str) -> AbstractContextManager[Any]:
    """A profiler range `fusco::<name>`."""
    # NOTE: entering a range costs microseconds also while no profiler runs; torch has no public
    # way to ask whether one does.
    return record_function(f"fusco::{name}") if torch._C._autograd._profiler_enabled() else _NOTHING
