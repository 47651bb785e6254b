"""Rows by lists: scattered to their slots, or summed, wherever the results go."""

from __future__ import annotations

from typing import Any

from fusco.engines.cpu.kernels.compiling import kernel
from fusco.engines.cpu.kernels.memory import copy_row
from fusco.engines.cpu.kernels.reduce import take_rows
from fusco.engines.cpu.kernels.rowsums import sum_rows
from fusco.layout.blocks import Ints


@kernel
def scatter_lists(
    source: int, row_bytes: int, row: Ints, slot_ptr: Ints, slot: Ints, target: Ints, base: Ints
) -> None:
    """Write the row of each segment to all of its slots.

    Args:
        source: address of the rows.
        row_bytes: size of one.
        row: `[n]`, the row of each segment; empty: segment i is row i.
        slot_ptr: `[n + 1]`.
        slot: `[m]`.
        target: `[m]`, the rank of each slot.
        base: `[P]`, address of slot 0 on each rank.
    """
    for i in range(slot_ptr.size - 1):
        number = row[i] if row.size else i
        for j in range(slot_ptr[i], slot_ptr[i + 1]):
            copy_row(base[target[j]] + slot[j] * row_bytes, source + number * row_bytes, row_bytes)


@kernel
def sum_lists(
    rows: Any,
    row_bytes: int,
    rows_at: int,
    weights_at: int,
    list_ptr: Ints,
    item: Ints,
    target: Ints,
    place: Ints,
    base: Ints,
    terms: Any,
) -> None:
    """Sum the rows of each list.

    Args:
        rows: an array of their elements; only its type is looked at.
        row_bytes: size of a row.
        rows_at: address of the rows.
        weights_at: address of their float32 weights; 0: a plain sum.
        list_ptr: `[n + 1]`.
        item: `[m]`.
        target: `[n]`, the rank that gets each sum.
        place: `[n]`, where there.
        base: `[P]`, address of place 0 on each rank.
        terms: from `new_terms`.
    """
    at, weight, _ = terms
    count = 0
    for i in range(-1, list_ptr.size - 1):
        now, then, ahead = i % 2, 1 - i % 2, 0
        if i + 2 < list_ptr.size:
            ahead = take_rows(
                rows_at, row_bytes, weights_at, list_ptr, item, i + 1, at[then], weight[then], 0
            )
        if i >= 0:
            sum_rows(
                rows,
                base[target[i]] + place[i] * row_bytes,
                at[now].ctypes.data,
                weight[now].ctypes.data,
                count,
                at[then].ctypes.data,
                ahead,
                row_bytes,
            )
        count = ahead
