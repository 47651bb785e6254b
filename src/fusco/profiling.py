"""Names for `torch.profiler`, and the times of slices, at no cost while nobody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


def stage(name: str) -> AbstractContextManager[Any]:
    """A profiler range `fusco::<name>`."""
    # NOTE: entering a range costs microseconds also while no profiler runs; torch has no public
    # way to ask whether one does, and a compiler cannot ask at all.
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return _NOTHING
    return record_function(f"fusco::{name}")


@dataclass(frozen=True, kw_only=True)
class SliceMark:
    """When a stage had one slice.

    Attributes:
        operation: such as "dispatch".
        stage: "load" (rows gathered or summed into staging memory), "send" (until it has left),
            "receive" (from the moment there was room for it until it is there) or "unload".
        peer: the rank at the other end; -1 for all of them.
        step: which slice.
        begin_s: on this host's clock, seconds, as is `end_s`.
    """

    operation: str
    stage: str
    peer: int
    step: int
    begin_s: float
    end_s: float


_recorders: list[list[SliceMark]] = []


@contextmanager
def recording() -> Iterator[list[SliceMark]]:
    """Collect the marks of all slices that this process moves meanwhile."""
    marks: list[SliceMark] = []
    _recorders.append(marks)
    try:
        yield marks
    finally:
        _recorders.remove(marks)


def mark(operation: str, stage: str, peer: int, step: int, begin_s: float, end_s: float) -> None:
    """Tell whoever records of a slice."""
    for marks in _recorders:
        marks.append(
            SliceMark(
                operation=operation,
                stage=stage,
                peer=peer,
                step=step,
                begin_s=begin_s,
                end_s=end_s,
            )
        )
