"""What lies where in the block that a rank reserves for what it will receive.

Every rank computes the offsets of every other from the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusco.layout.heap import ALIGNMENT

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sections:
    """Consecutive sections of one block a rank.

    Attributes:
        size: int64 `[sections, P]`, bytes.
        start: int64 `[sections, P]`, where each begins in its block, bytes.
        total: int64 `[P]`, the size of each rank's block, bytes.
    """

    size: Ints
    start: Ints
    total: Ints

    @classmethod
    def stack(cls, sizes: Sequence[Ints] | Ints) -> Sections:
        """Lay sections of these sizes, int64 `[P]` each, one behind the other."""
        size = np.asarray(sizes)
        start, total = stack(size)
        return cls(size=size, start=start, total=total)

    def of(self, ranks: Sequence[int]) -> Sections:
        """The same for some of the ranks, in this order."""
        chosen = list(ranks)
        return Sections(
            size=self.size[:, chosen], start=self.start[:, chosen], total=self.total[chosen]
        )


def stack(size: Ints) -> tuple[Ints, Ints]:
    """`start` and `total` of `Sections`; like the sizes below also compiled, by the CPU engine."""
    start, total = np.empty_like(size), np.zeros(size.shape[1], dtype=np.int64)
    for i in range(size.shape[0]):
        start[i] = total
        total += (size[i] + (ALIGNMENT - 1)) & -ALIGNMENT
    return start, total


def dispatch_sizes(row_bytes: Ints, rows: Ints, segments: Ints, pairs: Ints) -> Ints:
    """The block of a dispatch, int64 `[sections, P]`: the rows of each tensor, row weights
    (float32), and the slot lists that travel with a new plan (slots per segment, then slots;
    int64).

    Args:
        row_bytes: `[parts]`, of each tensor.
        rows: `[P]`, rows each rank receives.
        segments: `[P]`, segments each rank receives; 0 where the plan is not new.
        pairs: `[P]`, likewise slots.
    """
    parts = row_bytes.size
    size = np.empty((parts + 3, rows.size), dtype=np.int64)
    for i in range(parts):
        size[i] = rows * row_bytes[i]
    size[parts], size[parts + 1], size[parts + 2] = rows * 4, segments * 8, pairs * 8
    return size


def combine_sizes(row_bytes: Ints, segments: Ints, pairs: Ints) -> Ints:
    """The block of a combine, int64 `[sections, P]`: a partial sum for each segment that the rank
    once sent, for each tensor, and one float32 for each pair.

    Args:
        row_bytes: `[parts]`, of each tensor.
        segments: `[P]`, segments each rank sends in a dispatch.
        pairs: `[P]`, pairs each rank sends; 0 where no values return.
    """
    parts = row_bytes.size
    size = np.empty((parts + 1, segments.size), dtype=np.int64)
    for i in range(parts):
        size[i] = segments * row_bytes[i]
    size[parts] = pairs * 4
    return size
