"""Where every section of every rank's block is mapped here, from what all ranks published."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusco.engines.cpu.kernels.compiling import inner, kernel
from fusco.layout import blocks
from fusco.layout.blocks import Ints

_stack = inner(blocks.stack)
_dispatch_sizes = inner(blocks.dispatch_sizes)
_combine_sizes = inner(blocks.combine_sizes)


@kernel
def place_dispatch(
    row_bytes: Ints,
    rows: Ints,
    segments: Ints,
    pairs: Ints,
    base: Ints,
    capacity: Ints,
    windows: Ints,
    mapped: Ints,
) -> Any:
    """The blocks of a dispatch with a new plan.

    Args:
        row_bytes: `[parts]`, of each tensor.
        rows: `[P]`, rows each rank receives.
        segments: `[P, P]`, between all ranks.
        pairs: `[P, P]`, likewise.
        base: `[P]`, where each rank's block begins in its window.
        capacity: `[P]`, its size.
        windows: `[P]`, where each window is mapped.
        mapped: `[P]`, how much of it.

    Returns:
        `start` and `total` of `Sections`; the address of each section `[sections, P]`; whether
        all blocks are large enough, and mapped.
    """
    sizes = _dispatch_sizes(row_bytes, rows, segments.sum(axis=0), pairs.sum(axis=0))
    start, total = _stack(sizes)
    fits = True
    for rank in range(total.size):
        fits &= total[rank] <= capacity[rank] and base[rank] + total[rank] <= mapped[rank]
    return start, total, start + (windows + base), fits


@kernel
def place_combine(
    row_bytes: Ints,
    said: Ints,
    base: Ints,
    windows: Ints,
    mapped: Ints,
    is_weighted: bool,
) -> Any:
    """The blocks of a combine, and the rows that can be read where they are.

    Args:
        row_bytes: `[parts]`, of each tensor.
        said: `[P, COMBINE_FIELDS]`, what all ranks published.
        base: as in `place_dispatch`, as are `windows` and `mapped`.
        is_weighted: whether the rows have weights.

    Returns:
        `start` of `Sections`; the address of each section `[sections, P]`; of each rank's rows and
        weights `[2, P]`, 0 where it sends partials; how many ranks' rows can be read; `[P]`, up to
        where each window is needed, and whether so much is mapped.
    """
    start, total = _stack(_combine_sizes(row_bytes, said[:, 0].copy(), said[:, 1].copy()))
    sources = np.zeros((2, base.size), dtype=np.int64)
    ends, num_open, fits = np.empty_like(base), 0, True
    for rank in range(base.size):
        rows_at, weights_at, end = said[rank, 2], said[rank, 3], said[rank, 4]
        ends[rank] = max(base[rank] + total[rank], end)
        fits &= ends[rank] <= mapped[rank]
        if rows_at >= 0:
            num_open += 1
            sources[0, rank] = windows[rank] + rows_at
            if is_weighted:
                sources[1, rank] = windows[rank] + weights_at
    return start, start + (windows + base), sources, num_open, ends, fits


@kernel
def combine_need(row_bytes: Ints, num_segments: int, num_values: int) -> int:
    """The size of one rank's block of a combine."""
    segments, values = np.full(1, num_segments), np.full(1, num_values)
    return _stack(_combine_sizes(row_bytes, segments, values))[1][0]
