"""Combine: the sums of the contract. Multiply, then add; numba never fuses the two."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusco.engines.cpu.kernels.elements import narrow, widen
from fusco.engines.cpu.kernels.memory import copy
from fusco.layout.blocks import Ints

CHUNK = 1024
"""Elements summed at a time: the fp32 sums and the rows' pieces stay in the first-level cache
(tuned for 2,048 bfloat16 elements a row on a 32 KiB cache)."""


@njit(cache=True, nogil=True, inline="always")
def _round(sums: Any, line: Any, length: int) -> None:
    for i in range(length):
        line[i] = narrow(sums[i], line[i])


@njit(cache=True, nogil=True)
def _partial(
    sums: Any, rows: Any, width: int, begin: int, length: int, weights: Any, slot: Any
) -> None:
    """Sum columns `begin:begin + length` of the rows in `slot`, k ascending."""
    sums[:length] = 0
    for j in range(slot.size):
        # An empty `weights` means a plain sum.
        if weights.size:
            weight = weights[slot[j]]
            for i in range(length):
                sums[i] += weight * widen(rows[slot[j] * width + begin + i])
        else:
            for i in range(length):
                sums[i] += widen(rows[slot[j] * width + begin + i])


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
                length = min(CHUNK, width - begin)
                _partial(sums, rows, width, begin, length, weights, mine)
                _round(sums, line, length)
                copy(to + begin * item, line.ctypes.data, length * item)


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
        sums: `[CHUNK]`, scratch, as are `node`, `total` and `line`.
        out: `[T * width]`.
    """
    num_tokens, top_k = sum_segment.shape
    for token in range(num_tokens):
        for begin in range(0, width, CHUNK):
            length = min(CHUNK, width - begin)
            total[:length] = 0
            node[:length] = 0
            last = -1
            for j in range(top_k):
                segment = sum_segment[token, j]
                if segment < 0:
                    continue
                if last >= 0 and sum_node[token, j] != last:
                    _round(node, line, length)
                    for i in range(length):
                        total[i] += widen(line[i])
                        node[i] = 0
                last = sum_node[token, j]
                if own_sent <= segment < own_sent + num_own:
                    arrived = segment - own_sent + own_arrived
                    mine = slot[slot_ptr[arrived] : slot_ptr[arrived + 1]]
                    _partial(sums, rows, width, begin, length, weights, mine)
                    _round(sums, line, length)
                    for i in range(length):
                        node[i] += widen(line[i])
                else:
                    at = segment * width + begin
                    for i in range(length):
                        node[i] += widen(partials[at + i])
            _round(node, line, length)
            for i in range(length):
                total[i] += widen(line[i])
            to = token * width + begin
            for i in range(length):
                out[to + i] = narrow(total[i], out[to + i])


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
