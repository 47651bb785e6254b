"""Combine: the sums of the contract."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusco.engines.cpu.kernels.compiling import inner, kernel
from fusco.engines.cpu.kernels.memory import copy, load_float
from fusco.engines.cpu.kernels.rowsums import (
    LAST_OF_NODE,
    LAST_ROW,
    PARTIAL,
    ROW,
    sum_rows,
    sum_terms,
)
from fusco.layout.blocks import Ints


@kernel
def send_partials(
    rows: Any,
    row_bytes: int,
    rows_at: int,
    weights_at: int,
    slot_ptr: Ints,
    slot: Ints,
    peer_ptr: Ints,
    peer_start: Ints,
    own: int,
    base: Ints,
    terms: Any,
) -> None:
    """Sum every arrived segment and write the partial into its sender's window.

    Args:
        rows: an array of elements as in `elements`; only its type is looked at.
        row_bytes: size of a row.
        rows_at: address of the rows.
        weights_at: address of their float32 weights; 0: a plain sum.
        slot_ptr: `[n + 1]`, of the arrival, as are those up to `peer_start`.
        slot: `[m]`.
        peer_ptr: `[P + 1]`.
        peer_start: `[P]`.
        own: this rank, which needs no partials of its own.
        base: `[P]`, address of the first partial on each rank.
        terms: from `new_terms`.
    """
    at, weight, _ = terms
    for peer in range(peer_ptr.size - 1):
        first, last = peer_ptr[peer], peer_ptr[peer + 1]
        if peer == own or first == last:
            continue
        to = base[peer] + peer_start[peer] * row_bytes
        count = take_rows(
            rows_at, row_bytes, weights_at, slot_ptr, slot, first, at[0], weight[0], 0
        )
        for segment in range(first, last):
            i = (segment - first) % 2
            ahead = 0
            if segment + 1 < last:
                ahead = take_rows(
                    rows_at,
                    row_bytes,
                    weights_at,
                    slot_ptr,
                    slot,
                    segment + 1,
                    at[1 - i],
                    weight[1 - i],
                    0,
                )
            sum_rows(
                rows,
                to + (segment - first) * row_bytes,
                at[i].ctypes.data,
                weight[i].ctypes.data,
                count,
                at[1 - i].ctypes.data,
                ahead,
                row_bytes,
            )
            count = ahead


@kernel
def sum_tokens(
    rows: Any,
    row_bytes: int,
    sources: Ints,
    partials_at: int,
    slot_ptr: Ints,
    slot: Ints,
    target: Ints,
    sum_segment: Any,
    sum_node: Any,
    out: int,
    terms: Any,
) -> None:
    """Sum every token's partials: ranks of a node in order, rounded, then nodes in order.

    Args:
        rows: as in `send_partials`, as is `row_bytes`.
        sources: `[2, P]`, address of each rank's rows, if they can be read here, or 0: it sends
            partials; and of their float32 weights, or 0: a plain sum.
        partials_at: address of what the other ranks have written, by segment.
        slot_ptr: `[n + 1]`, of the leg, as is what follows.
        slot: `[m]`.
        target: `[m]`.
        sum_segment: `[T, K]`.
        sum_node: `[T, K]`.
        out: address of the sums.
        terms: from `new_terms`.
    """
    at, weight, kind = terms
    rows_at, weights_at = sources
    num_tokens, top_k = sum_segment.shape
    count = 0
    for token in range(-1, num_tokens):
        i, ahead, node = token % 2, 0, -1
        if token + 1 < num_tokens:
            for j in range(top_k):
                segment = sum_segment[token + 1, j]
                if segment < 0:
                    continue
                if ahead > 0 and sum_node[token + 1, j] != node:
                    kind[1 - i, ahead - 1] |= LAST_OF_NODE
                node = sum_node[token + 1, j]
                rank = target[slot_ptr[segment]]
                if rows_at[rank] == 0:
                    at[1 - i, ahead] = partials_at + segment * row_bytes
                    kind[1 - i, ahead] = PARTIAL
                    ahead += 1
                    continue
                before = ahead
                ahead = take_rows(
                    rows_at[rank],
                    row_bytes,
                    weights_at[rank],
                    slot_ptr,
                    slot,
                    segment,
                    at[1 - i],
                    weight[1 - i],
                    ahead,
                )
                kind[1 - i, before : ahead - 1] = ROW
                kind[1 - i, ahead - 1] = LAST_ROW
        if token >= 0:
            sum_terms(
                rows,
                out + token * row_bytes,
                at[i].ctypes.data,
                weight[i].ctypes.data,
                kind[i].ctypes.data,
                count,
                at[1 - i].ctypes.data,
                ahead,
                row_bytes,
            )
        count = ahead


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


def new_terms(top_k: int, wide: Any) -> tuple[Ints, Any, Ints]:
    """Addresses, weights and kinds of the terms of two sums, the present and the next.

    Args:
        top_k: the most terms a sum has.
        wide: what sums are taken in, float32 or float64.
    """
    shape = (2, top_k)
    return np.empty(shape, np.int64), np.empty(shape, wide), np.empty(shape, np.int64)


@inner
def take_rows(
    rows_at: int,
    row_bytes: int,
    weights_at: int,
    slot_ptr: Ints,
    slot: Ints,
    segment: int,
    at: Ints,
    weight: Any,
    count: int,
) -> int:
    """Append the rows of a segment to the terms; how many there are then."""
    for i in range(slot_ptr[segment], slot_ptr[segment + 1]):
        at[count] = rows_at + slot[i] * row_bytes
        weight[count] = 1 if weights_at == 0 else load_float(weights_at + slot[i] * 4)
        count += 1
    return count
