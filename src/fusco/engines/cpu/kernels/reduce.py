"""Combine: the sums of the contract. Multiply, then add; numba never fuses the two.

Rows are summed in pieces of `CHUNK` elements, so that pieces and sums stay in the first-level
cache. The first row of a sum starts it and the last one rounds it, so that no pass is spent on
either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusco.engines.cpu.kernels.elements import narrow, widen
from fusco.engines.cpu.kernels.memory import copy, copy_row
from fusco.layout.blocks import Ints

CHUNK = 1024
"""Elements; tuned for bfloat16 rows of 2,048 and a first-level cache of 32 KiB."""


@njit(cache=True, nogil=True)
def send_partials(
    rows: Any,
    width: int,
    weights: Any,
    slot_ptr: Ints,
    slot: Ints,
    peer_ptr: Ints,
    own: int,
    base: Ints,
    sums: Any,
    line: Any,
) -> None:
    """Sum every arrived segment and write the partial into its sender's window.

    Args:
        rows: `[R * width]`, elements as in `elements`.
        width: elements a row.
        weights: `[R]` in the dtype of `sums`; empty: a plain sum.
        slot_ptr: `[n + 1]`, of the arrival, as are `slot` and `peer_ptr`.
        slot: `[m]`.
        peer_ptr: `[P + 1]`.
        own: this rank, whose segments are summed by `sum_tokens`.
        base: `[P]`, address on each rank for the first partial from here.
        sums: `[CHUNK]`, scratch, float32 or float64.
        line: `[CHUNK]`, scratch, elements.
    """
    item = line.itemsize
    for peer in range(peer_ptr.size - 1):
        if peer == own:
            continue
        for segment in range(peer_ptr[peer], peer_ptr[peer + 1]):
            to = base[peer] + (segment - peer_ptr[peer]) * width * item
            mine = slot[slot_ptr[segment] : slot_ptr[segment + 1]]
            for begin in range(0, width, CHUNK):
                piece = line[: min(CHUNK, width - begin)]
                _sum_rows(piece, sums, rows, width, begin, weights, mine)
                copy_row(to + begin * item, piece.ctypes.data, piece.size * item)


@njit(cache=True, nogil=True)
def sum_tokens(
    rows: Any,
    width: int,
    weights: Any,
    slot_ptr: Ints,
    slot: Ints,
    own_sent: int,
    own_arrived: int,
    num_own: int,
    partials: Any,
    sum_segment: Any,
    sum_node: Any,
    sums: Any,
    node: Any,
    total: Any,
    line: Any,
    own_line: Any,
    out: Any,
) -> None:
    """Sum every token's partials: ranks of a node in order, rounded, then nodes in order.

    Args:
        rows: as in `send_partials`, as are `width`, `weights`, `slot_ptr` and `slot`.
        own_sent: the first segment that this rank sent to itself, counted in its leg.
        own_arrived: the same segment, counted in its arrival.
        num_own: how many there are.
        partials: `[n * width]`, what the peers have written, by segment of the leg.
        sum_segment: `[T, K]`, of the leg, as is `sum_node`.
        sum_node: `[T, K]`.
        sums: `[CHUNK]`, scratch, as are `node`, `total`, `line` and `own_line`.
        out: `[T * width]`.
    """
    num_tokens, top_k = sum_segment.shape
    item = line.itemsize
    one = sums.dtype.type(1)
    segments = np.empty(top_k, dtype=np.int64)
    nodes = np.empty(top_k, dtype=np.int64)
    for token in range(num_tokens):
        count = 0
        for j in range(top_k):
            if sum_segment[token, j] >= 0:
                segments[count] = sum_segment[token, j]
                nodes[count] = sum_node[token, j]
                count += 1
        for begin in range(0, width, CHUNK):
            piece = line[: min(CHUNK, width - begin)]
            length = piece.size
            # One node's rounded sum is the result already.
            one_node = count > 0 and nodes[0] == nodes[count - 1]
            if not one_node:
                total[:length] = 0
            for j in range(count):
                segment = segments[j]
                if own_sent <= segment < own_sent + num_own:
                    arrived = segment - own_sent + own_arrived
                    mine = slot[slot_ptr[arrived] : slot_ptr[arrived + 1]]
                    partial = own_line[:length]
                    _sum_rows(partial, sums, rows, width, begin, weights, mine)
                else:
                    at = segment * width + begin
                    partial = partials[at : at + length]
                starts = j == 0 or nodes[j] != nodes[j - 1]
                ends = j == count - 1 or nodes[j] != nodes[j + 1]
                _accumulate(piece, node, partial, one, starts, ends)
                if ends and not one_node:
                    _add(total, piece)
            if not one_node:
                _round(piece, total)
            to = out.ctypes.data + (token * width + begin) * item
            copy_row(to, piece.ctypes.data, length * item)


@njit(cache=True, nogil=True)
def send_values(
    values: Any, slot_ptr: Ints, slot: Ints, peer_ptr: Ints, base: Ints, packed: Any
) -> None:
    """Return the float32 of every arrived slot to its sender.

    Args:
        values: `[R]`.
        slot_ptr: as in `send_partials`, as are `slot` and `peer_ptr`.
        base: `[P]`, address on each rank for the first value from here.
        packed: `[m]`, scratch.
    """
    for i in range(slot.size):
        packed[i] = values[slot[i]]
    for peer in range(peer_ptr.size - 1):
        first, last = slot_ptr[peer_ptr[peer]], slot_ptr[peer_ptr[peer + 1]]
        copy(base[peer], packed.ctypes.data + first * 4, (last - first) * 4)


def scratch(dtype: np.dtype[Any]) -> Any:
    """One line of `CHUNK` elements."""
    return np.empty(CHUNK, dtype)


@njit(cache=True, nogil=True)
def _sum_rows(
    out: Any, sums: Any, rows: Any, width: int, begin: int, weights: Any, slot: Any
) -> None:
    """Sum the rows in `slot`, k ascending, from column `begin` on; an empty `weights` means 1."""
    one = sums.dtype.type(1)
    for j in range(slot.size):
        at = slot[j] * width + begin
        weight = weights[slot[j]] if weights.size else one
        row = rows[at : at + out.size]
        _accumulate(out, sums, row, weight, j == 0, j == slot.size - 1)


@njit(cache=True, nogil=True)
def _accumulate(out: Any, sums: Any, row: Any, weight: Any, starts: bool, ends: bool) -> None:
    """Add `weight * row` to `sums`, which `starts` with it; if it `ends`, `out` is the sum."""
    if starts and ends:
        for i in range(row.size):
            # Adding to zero turns -0 into 0, as every sum here does.
            out[i] = narrow(_ZERO + weight * widen(row[i]), out[i])
    elif starts:
        for i in range(row.size):
            sums[i] = _ZERO + weight * widen(row[i])
    elif ends:
        for i in range(row.size):
            out[i] = narrow(sums[i] + weight * widen(row[i]), out[i])
    else:
        for i in range(row.size):
            sums[i] += weight * widen(row[i])


@njit(cache=True, nogil=True)
def _add(sums: Any, row: Any) -> None:
    for i in range(row.size):
        sums[i] += widen(row[i])


@njit(cache=True, nogil=True)
def _round(out: Any, sums: Any) -> None:
    for i in range(out.size):
        out[i] = narrow(sums[i], out[i])


_ZERO = np.float32(0)
