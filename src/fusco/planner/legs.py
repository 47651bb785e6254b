"""Segment descriptors of one hop: dense arrays, the sender's mirrored at the receiver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusco.legs import Arrival, Leg
from fusco.planner.sorting import offsets, stable_argsort
from fusco.planner.traffic import HopSizes


@dataclass(frozen=True, kw_only=True, eq=False)
class HopPairs:
    """The pairs that may take a hop, in row-major order; every field has one entry a pair.

    Attributes:
        peer: the rank each pair is sent to; P where it does not take this hop.
        is_first: whether it opens a segment; a segment's other pairs follow it in its row.
        row: the row it is read from.
        slot: its final slot.
        pair: its index among the pairs of the rows.
        target: the rank that owns its slot.
    """

    peer: Tensor
    is_first: Tensor
    row: Tensor
    slot: Tensor
    pair: Tensor
    target: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Descriptors:
    """A leg without its sums, and for every input pair the segment it opens (-1: none)."""

    peer_ptr: Tensor
    row: Tensor
    slot_ptr: Tensor
    slot: Tensor
    pair: Tensor
    target: Tensor
    opened: Tensor


def describe(pairs: HopPairs, sizes: HopSizes, rank: int) -> Descriptors:
    """Sort pairs by peer, then row, and mark where segments begin.

    Args:
        pairs: in row-major order, so that one stable sort by peer suffices.
        sizes: of this hop, all ranks.
        rank: the sender.
    """
    peer_ptr = offsets(sizes.segments[rank])
    num_pairs = int(sizes.pairs[rank].sum())
    order = stable_argsort(pairs.peer, sizes.pairs.shape[0] + 1)[:num_pairs]
    is_first = pairs.is_first[order]
    begin = torch.nonzero(is_first)[:, 0]
    opened = torch.full_like(pairs.peer, -1)
    opened[order[begin]] = torch.arange(begin.shape[0], device=begin.device)
    return Descriptors(
        peer_ptr=peer_ptr,
        row=pairs.row[order[begin]],
        slot_ptr=torch.cat((begin, begin.new_tensor([num_pairs]))),
        slot=pairs.slot[order],
        pair=pairs.pair[order],
        target=pairs.target[order],
        opened=opened,
    )


def mirror(
    sizes: HopSizes, rank: int, slots_per_segment: Tensor, slot: Tensor, target: Tensor
) -> Arrival:
    """The receiver's side of a hop.

    Args:
        sizes: of this hop, all ranks.
        rank: the receiver.
        slots_per_segment: int64 `[n]`, shipped by the senders, in order of sender.
        slot: int64 `[m]`, likewise.
        target: int64 `[m]`, likewise.
    """
    return Arrival(
        peer_ptr=offsets(sizes.segments[:, rank]),
        peer_start=sizes.segments[:, :rank].sum(dim=1),
        pair_start=sizes.pairs[:, :rank].sum(dim=1),
        slot_ptr=offsets(slots_per_segment),
        slot=slot,
        target=target,
    )


def shipment(leg: Leg, peer: int) -> tuple[Tensor, Tensor, Tensor]:
    """The slot lists that travel to `peer`: slots per segment, slots, and their ranks."""
    begin, end = int(leg.peer_ptr[peer]), int(leg.peer_ptr[peer + 1])
    first, last = int(leg.slot_ptr[begin]), int(leg.slot_ptr[end])
    return (
        leg.slot_ptr[begin : end + 1].diff(),
        leg.slot[first:last],
        leg.target[first:last],
    )
