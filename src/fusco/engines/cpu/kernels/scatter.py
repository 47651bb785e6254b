"""Dispatch: rows, weights and slot lists straight into the peers' windows."""

from __future__ import annotations

from typing import Any

from fusco.engines.cpu.kernels.compiling import kernel
from fusco.engines.cpu.kernels.memory import copy, copy_row
from fusco.layout.blocks import Ints


@kernel
def scatter_rows(
    source: int,
    row_bytes: int,
    slot_ptr: Ints,
    slot: Ints,
    target: Ints,
    sum_segment: Any,
    base: Ints,
) -> None:
    """Write each row to all of its slots.

    Rows in token order: each is read from memory once, and from the cache for its other slots.

    Args:
        source: address of the rows.
        row_bytes: size of one.
        slot_ptr: `[n + 1]`, of the leg, as is what follows.
        slot: `[m]`.
        target: `[m]`.
        sum_segment: `[T, K]`.
        base: `[P]`, address of slot 0 on each rank.
    """
    for token in range(sum_segment.shape[0]):
        row = source + token * row_bytes
        for segment in sum_segment[token]:
            if segment >= 0:
                for i in range(slot_ptr[segment], slot_ptr[segment + 1]):
                    copy_row(base[target[i]] + slot[i] * row_bytes, row, row_bytes)


@kernel
def scatter_values(source: int, pair: Ints, slot: Ints, target: Ints, base: Ints) -> None:
    """Write the float32 of each pair to its slot.

    Args:
        source: address of the values, `[T * K]`.
        pair: `[m]`, of the leg, as are `slot` and `target`.
        slot: `[m]`.
        target: `[m]`.
        base: `[P]`, address of slot 0 on each rank.
    """
    for i in range(pair.size):
        copy(base[target[i]] + slot[i] * 4, source + pair[i] * 4, 4)


@kernel
def ship_slots(
    peer_ptr: Ints, slot_ptr: Ints, slot: Ints, segments: Ints, pairs: Ints, rank: int, at: Ints
) -> Ints:
    """Send every rank the slot lists of its segments.

    Args:
        peer_ptr: `[P + 1]`, of the leg, as are `slot_ptr` and `slot`.
        slot_ptr: `[n + 1]`.
        slot: `[m]`.
        segments: `[P, P]`, between all ranks.
        pairs: `[P, P]`, likewise.
        rank: this rank.
        at: `[sections, P]`, addresses; the last two are of slots per segment, and of slots.

    Returns:
        `[P]`, how many pairs the ranks before this one send to each rank.
    """
    before = pairs[:rank].sum(axis=0)
    per_segment = slot_ptr[1:] - slot_ptr[:-1]
    for peer in range(peer_ptr.size - 1):
        begin, end = peer_ptr[peer], peer_ptr[peer + 1]
        first, last = slot_ptr[begin], slot_ptr[end]
        counts_at = at[-2, peer] + segments[:rank, peer].sum() * 8
        copy(counts_at, per_segment.ctypes.data + begin * 8, (end - begin) * 8)
        slots_at = at[-1, peer] + before[peer] * 8
        copy(slots_at, slot.ctypes.data + first * 8, (last - first) * 8)
    return before


@kernel
def gather_segments(source: int, offset: Ints, size: Ints, target: int) -> None:
    """Pack segments of `source` at the address `target`."""
    for i in range(offset.size):
        copy(target, source + offset[i], size[i])
        target += size[i]


@kernel
def scatter_segments(source: int, target: int, offset: Ints, size: Ints) -> None:
    """Unpack what lies at the address `source` into segments of `target`."""
    for i in range(offset.size):
        copy(target + offset[i], source, size[i])
        source += size[i]
