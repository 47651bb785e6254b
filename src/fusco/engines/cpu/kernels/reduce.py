"""Combine: the sums of the contract.

Rows are summed in pieces of `CHUNK` elements, so that pieces and sums stay in the first-level
cache, and two rows in a pass, so that most sums never leave the registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusco.engines.cpu.kernels.compiling import inner, kernel
from fusco.engines.cpu.kernels.elements import accumulate, sum_four
from fusco.engines.cpu.kernels.memory import copy, copy_row, prefetch
from fusco.layout.blocks import Ints

CHUNK = 1024
"""Elements; tuned for bfloat16 rows of 2,048 and a first-level cache of 32 KiB."""


@kernel
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
    item, last = line.itemsize, slot_ptr.size - 1
    for peer in range(peer_ptr.size - 1):
        if peer == own:
            continue
        for segment in range(peer_ptr[peer], peer_ptr[peer + 1]):
            to = base[peer] + (segment - peer_ptr[peer]) * width * item
            mine = slot[slot_ptr[segment] : slot_ptr[segment + 1]]
            following = slot[slot_ptr[segment + 1] : slot_ptr[min(segment + 2, last)]]
            for begin in range(0, width, CHUNK):
                piece = line[: min(CHUNK, width - begin)]
                for each in following:
                    ahead = each * width + begin
                    prefetch(rows.ctypes.data + ahead * item, piece.size * item)
                _sum_rows(piece, sums, rows, width, begin, weights, mine)
                copy_row(to + begin * item, piece.ctypes.data, piece.size * item)


@kernel
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
    total: Any,
    line: Any,
    own_line: Any,
    last_line: Any,
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
        sums: `[CHUNK]`, scratch, as are `total`, `line`, `own_line` and `last_line`.
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
        one_node = count > 0 and nodes[0] == nodes[count - 1]
        if token + 1 < num_tokens:
            for j in range(top_k):
                segment = sum_segment[token + 1, j]
                if segment >= 0 and not own_sent <= segment < own_sent + num_own:
                    prefetch(partials.ctypes.data + segment * width * item, width * item)
        for begin in range(0, width, CHUNK):
            piece = line[: min(CHUNK, width - begin)]
            mine, result = own_line[: piece.size], last_line[: piece.size]
            first = 0
            while first < count:
                last = first + 1
                while last < count and nodes[last] == nodes[first]:
                    last += 1
                for j in range(first, last):
                    arrived = segments[j] - own_sent + own_arrived
                    if own_sent <= segments[j] < own_sent + num_own:
                        own = slot[slot_ptr[arrived] : slot_ptr[arrived + 1]]
                        _sum_rows(mine, sums, rows, width, begin, weights, own)
                for j in range(first, last, 2):
                    a = _partial(segments[j], own_sent, num_own, mine, partials, width, begin)
                    other = segments[min(j + 1, last - 1)]
                    b = _partial(other, own_sent, num_own, mine, partials, width, begin)
                    n = last - first
                    if 3 <= n <= 4:
                        other = segments[first + 2]
                        c = _partial(other, own_sent, num_own, mine, partials, width, begin)
                        other = segments[last - 1]
                        d = _partial(other, own_sent, num_own, mine, partials, width, begin)
                        sum_four(piece, sums, a, one, b, one, c, one, d, one, n)
                        break
                    two, ends = j + 1 < last, j + 2 >= last
                    accumulate(piece, sums, a, one, b, one, two, j == first, ends)
                # One node's rounded sum is the result already.
                if not one_node:
                    accumulate(
                        result, total, piece, one, piece, one, False, first == 0, last == count
                    )
                first = last
            if count == 0:
                result[:] = 0
            source = piece if one_node else result
            to = out.ctypes.data + (token * width + begin) * item
            copy_row(to, source.ctypes.data, piece.size * item)


@kernel
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


def scratch(dtype: np.dtype[Any], lines: int = 1) -> Any:
    """`lines` lines of `CHUNK` elements; the sums of words take two."""
    return np.empty(lines * CHUNK, dtype)


@inner
def _sum_rows(
    out: Any, sums: Any, rows: Any, width: int, begin: int, weights: Any, slot: Any
) -> None:
    """Sum the rows in `slot`, k ascending, from column `begin` on; an empty `weights` means 1."""
    one, n = sums.dtype.type(1), slot.size
    for j in range(0, n, 2):
        first, second = slot[j], slot[min(j + 1, n - 1)]
        a = rows[first * width + begin :][: out.size]
        b = rows[second * width + begin :][: out.size]
        u = weights[first] if weights.size else one
        v = weights[second] if weights.size else one
        if 3 <= n <= 4:
            third, fourth = slot[2], slot[n - 1]
            c = rows[third * width + begin :][: out.size]
            d = rows[fourth * width + begin :][: out.size]
            w = weights[third] if weights.size else one
            z = weights[fourth] if weights.size else one
            sum_four(out, sums, a, u, b, v, c, w, d, z, n)
            break
        accumulate(out, sums, a, u, b, v, j + 1 < n, j == 0, j + 2 >= n)


@inner
def _partial(
    segment: int, own_sent: int, num_own: int, mine: Any, partials: Any, width: int, begin: int
) -> Any:
    """A piece of a segment's partial: this rank's, just summed, or one that a peer has written."""
    if own_sent <= segment < own_sent + num_own:
        return mine
    return partials[segment * width + begin :][: mine.size]
