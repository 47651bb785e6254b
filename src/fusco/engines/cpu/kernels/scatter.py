"""Dispatch: rows, weights and slot lists straight into the peers' windows."""

from __future__ import annotations

from fusco.engines.cpu.kernels.compiling import kernel
from fusco.engines.cpu.kernels.memory import copy, copy_row
from fusco.layout.blocks import Ints


@kernel
def by_pair(pair: Ints, values: Ints, out: Ints) -> None:
    """`out[pair[i]] = values[i]`: from the order of a leg to the order of tokens."""
    for i in range(pair.size):
        out[pair[i]] = values[i]


@kernel
def scatter_rows(
    source: int, row_bytes: int, slot: Ints, target: Ints, top_k: int, base: Ints
) -> None:
    """Write each row to all of its slots.

    Rows in token order: each is read from memory once, and from the cache for its other slots.

    Args:
        source: address of the rows.
        row_bytes: size of one.
        slot: `[T * K]`, final slots; -1: none.
        target: `[T * K]`, the rank of each.
        top_k: K.
        base: `[P]`, address of slot 0 on each rank.
    """
    for pair in range(slot.size):
        if slot[pair] >= 0:
            to = base[target[pair]] + slot[pair] * row_bytes
            copy_row(to, source + pair // top_k * row_bytes, row_bytes)


@kernel
def scatter_values(source: int, slot: Ints, target: Ints, base: Ints) -> None:
    """Write the float32 of each pair to its slot; arguments as in `scatter_rows`."""
    for pair in range(slot.size):
        if slot[pair] >= 0:
            copy(base[target[pair]] + slot[pair] * 4, source + pair * 4, 4)


@kernel
def ship_slots(
    peer_ptr: Ints, slot_ptr: Ints, slot: Ints, counts_at: Ints, slots_at: Ints, per_segment: Ints
) -> None:
    """Send every rank the slot lists of its segments.

    Args:
        peer_ptr: `[P + 1]`, of the leg, as are `slot_ptr` and `slot`.
        slot_ptr: `[n + 1]`.
        slot: `[m]`.
        counts_at: `[P]`, address on each rank for the slots per segment.
        slots_at: `[P]`, address on each rank for the slots.
        per_segment: `[n]`, filled here with the slots per segment.
    """
    for segment in range(per_segment.size):
        per_segment[segment] = slot_ptr[segment + 1] - slot_ptr[segment]
    for peer in range(peer_ptr.size - 1):
        begin, end = peer_ptr[peer], peer_ptr[peer + 1]
        first, last = slot_ptr[begin], slot_ptr[end]
        copy(counts_at[peer], per_segment.ctypes.data + begin * 8, (end - begin) * 8)
        copy(slots_at[peer], slot.ctypes.data + first * 8, (last - first) * 8)


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
