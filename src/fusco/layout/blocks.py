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
    def stack(cls, sizes: Sequence[Ints]) -> Sections:
        """Lay sections of these sizes, int64 `[P]` each, one behind the other."""
        size = np.array(sizes)
        padded = (size + (ALIGNMENT - 1)) & -ALIGNMENT
        end = padded.cumsum(axis=0)
        return cls(size=size, start=end - padded, total=end[-1])

    def of(self, ranks: Sequence[int]) -> Sections:
        """The same for some of the ranks, in this order."""
        chosen = list(ranks)
        return Sections(
            size=self.size[:, chosen], start=self.start[:, chosen], total=self.total[chosen]
        )


def dispatch_sections(
    rows: Ints, row_bytes: Sequence[int], segments: Ints, pairs: Ints
) -> Sections:
    """The block of a dispatch: the rows of each tensor, row weights (float32), and the slot lists
    that travel with a new plan (slots per segment, then slots; int64).

    Args:
        rows: `[P]`, rows each rank receives.
        row_bytes: of each tensor.
        segments: `[P]`, segments each rank receives; 0 where the plan is not new.
        pairs: `[P]`, likewise slots.
    """
    return Sections.stack([*(rows * size for size in row_bytes), rows * 4, segments * 8, pairs * 8])


def combine_sections(segments: Ints, row_bytes: Sequence[int], pairs: Ints) -> Sections:
    """The block of a combine: a partial sum for each segment that the rank once sent, for each
    tensor, and one float32 for each pair.

    Args:
        segments: `[P]`, segments each rank sends in a dispatch.
        row_bytes: of each tensor.
        pairs: `[P]`, pairs each rank sends; 0 where no values return.
    """
    return Sections.stack([*(segments * size for size in row_bytes), pairs * 4])
