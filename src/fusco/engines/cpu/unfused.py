"""What fusion saves: the same transfers with a permute before and a permute after (for the
ablation of FUSCO, section 5.4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusco.engines.cpu.kernels.memory import copy
from fusco.layout.blocks import Ints
from fusco.layout.segments import as_segments
from fusco.types import Arrival, Leg, SegmentPlan


def write_device_major(rows: Sequence[Tensor], leg: Leg, top_k: int, at: Ints, first: Ints) -> None:
    """Pack rows by destination and copy each rank's into its window in one piece.

    Args:
        rows: tensors `[T, ...]`.
        leg: of this rank.
        top_k: K.
        at: int64 `[sections, P]`, address of each tensor's rows on each rank.
        first: int64 `[P]`, how many rows the ranks before this one send to each rank.
    """
    token = torch.div(leg.pair, top_k, rounding_mode="floor")
    bounds = leg.slot_ptr[leg.peer_ptr].tolist()
    for each, base in zip(rows, at, strict=False):
        packed = as_segments(each).index_select(0, token)
        row_bytes = packed.shape[1]
        for peer, (begin, end) in enumerate(itertools.pairwise(bounds)):
            to = base[peer] + first[peer] * row_bytes
            copy(to, packed.data_ptr() + begin * row_bytes, (end - begin) * row_bytes)


def first_rows(arrival: Arrival) -> Ints:
    """int64 `[P]`: where the rows of each source begin among all that arrive."""
    first: Ints = arrival.slot_ptr[arrival.peer_ptr[:-1]].numpy()
    return first


def expert_major(arrived: Tensor, arrival: Arrival, num_rows: int) -> Tensor:
    """Rows in order of arrival, uint8 `[m, bytes]`, permuted to their slots `[R, bytes]`."""
    rows = arrived.new_zeros(num_rows, arrived.shape[1])
    return rows.index_copy_(0, arrival.slot, arrived)


def in_order_of_arrival(
    rows: tuple[Tensor, ...], row_weights: Tensor | None, plan: SegmentPlan, rank: int
) -> tuple[tuple[Tensor, ...], Tensor | None, SegmentPlan]:
    """Rows and weights permuted back to the order in which they arrived, and a plan that finds
    them there."""
    leg, arrival = plan.send, plan.arrival
    permuted = tuple(each.index_select(0, arrival.slot) for each in rows)
    weights = None if row_weights is None else row_weights[arrival.slot]
    place = torch.arange(arrival.slot.shape[0])
    own_arrived = arrival.slot_ptr[arrival.peer_ptr[rank : rank + 2]].tolist()
    own_sent = leg.slot_ptr[leg.peer_ptr[rank : rank + 2]].tolist()
    slot = leg.slot.clone()
    slot[slice(*own_sent)] = place[slice(*own_arrived)]
    moved = replace(plan, send=replace(leg, slot=slot), arrival=replace(arrival, slot=place))
    return permuted, weights, moved
