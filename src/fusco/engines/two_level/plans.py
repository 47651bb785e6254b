"""Plans in slices: what the planner says, and in which order a combine sums it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusco.legs import Arrival, Leg, Partials
from fusco.planner import HopSizes, Traffic, offsets
from fusco.planner.legs import mirror


@dataclass(frozen=True, kw_only=True)
class Hops:
    """Sizes of the three hops of a plan, on the CPU, where they are looked at one by one."""

    near: HopSizes
    far: HopSizes
    relay: HopSizes

    @classmethod
    def of(cls, traffic: Traffic) -> Hops:
        assert traffic.forward is not None
        assert traffic.relay is not None
        parts = (traffic.direct, traffic.forward, traffic.relay)
        near, far, relay = (
            HopSizes(segments=part.segments.cpu(), pairs=part.pairs.cpu()) for part in parts
        )
        return cls(near=near, far=far, relay=relay)


def with_bounds_on_host(leg: Leg) -> Leg:
    """A leg whose few `peer_ptr` are on the CPU, whatever device the rest is on."""
    return replace(leg, peer_ptr=leg.peer_ptr.cpu())


def pack_lists(leg: Leg, peer: int, tokens_per_slice: int) -> Tensor:
    """What a forwarder must know of the segments it gets, int32 on the CPU: slots and slice of each
    segment, then the slots and their ranks."""
    segments, slots = _ranges(leg, peer)
    row, ptr = leg.row[segments], leg.slot_ptr[segments.start : segments.stop + 1]
    parts = (ptr.diff(), row // tokens_per_slice, leg.slot[slots], leg.target[slots])
    return torch.cat(parts).to(torch.int32).cpu()


def packed_len(sizes: HopSizes, sender: int, receiver: int) -> int:
    """The length of what `pack_lists` makes."""
    segments, pairs = sizes.segments[sender, receiver], sizes.pairs[sender, receiver]
    return 2 * int(segments) + 2 * int(pairs)


def unpack_lists(
    packed: Sequence[Tensor], sizes: HopSizes, rank: int, device: torch.device | str = "cpu"
) -> tuple[Arrival, Tensor]:
    """What a forwarder receives, and the slice of each segment; from all ranks' packed lists.

    Bounds stay on the CPU, all else goes to `device`.
    """
    fields: tuple[list[Tensor], ...] = ([], [], [], [])
    for sender, message in enumerate(packed):
        n, m = int(sizes.segments[sender, rank]), int(sizes.pairs[sender, rank])
        for field, part in zip(fields, message.split([n, n, m, m]), strict=True):
            field.append(part)
    counts, in_slice, slot, target = (
        torch.cat(field).to(device).to(torch.int64) for field in fields
    )
    return mirror(sizes, rank, counts, slot, target), in_slice


def node_lists(leg: Leg, in_slice: Tensor, peer: int) -> Tensor:
    """What a rank of the node must know of the rows it gets, int64: slots and slice of each
    segment, then the slots."""
    segments, slots = _ranges(leg, peer)
    ptr = leg.slot_ptr[segments.start : segments.stop + 1]
    return torch.cat((ptr.diff(), in_slice[segments], leg.slot[slots]))


def node_list_lens(hops: Hops) -> Tensor:
    """int64 `[P, P]`: the length of both `node_lists`, of own tokens and relayed, by sender and
    receiver."""
    parts = (hops.near, hops.relay)
    nothing = torch.zeros(1, dtype=torch.int64, device="cpu")
    return sum((2 * hop.segments + hop.pairs for hop in parts), nothing)


def read_partials(
    lists: Tensor, near: HopSizes, relay: HopSizes, node: Sequence[int], rank: int
) -> Partials:
    """What this rank sums for the ranks of its node, from the lists that they have sent.

    Args:
        lists: int64, the `node_lists` of own tokens and those relayed, of each rank of the node.
        near: sizes, of own tokens.
        relay: sizes, of tokens relayed.
        node: its ranks, ascending.
        rank: this rank.
    """
    device = lists.device
    columns: list[list[Tensor]] = [[] for _ in range(6)]
    begin = 0
    for peer in node:
        place = pair_place = 0
        for hop in (near, relay):
            n, m = int(hop.segments[peer, rank]), int(hop.pairs[peer, rank])
            first = place + int(hop.segments[peer, :rank].sum())
            first_pair = pair_place + int(hop.pairs[peer, :rank].sum())
            found = lists[begin : begin + 2 * n + m].split([n, n, m])
            made = (
                torch.full((n,), peer, device=device),
                torch.arange(first, first + n, device=device),
                torch.arange(first_pair, first_pair + m, device=device),
            )
            for column, part in zip(columns, (*found, *made), strict=True):
                column.append(part)
            begin += 2 * n + m
            place += int(hop.segments[peer].sum())
            pair_place += int(hop.pairs[peer].sum())
    counts, in_slice, slot, target, place_of, pair_place_of = (torch.cat(each) for each in columns)
    order = torch.argsort(in_slice, stable=True)
    sorted_counts = counts[order]
    slot_ptr = offsets(sorted_counts)
    shift = torch.repeat_interleave(offsets(counts)[:-1][order] - slot_ptr[:-1], sorted_counts)
    chosen = torch.arange(slot.shape[0], device=device) + shift
    return Partials(
        slice_ptr=offsets(torch.bincount(in_slice)).cpu(),
        target=target[order],
        place=place_of[order],
        slot_ptr=slot_ptr,
        slot=slot[chosen],
        pair_place=pair_place_of[chosen],
    )


def held_lists(near: Leg, relay: Leg) -> tuple[Tensor, Tensor]:
    """Lists of the partials of every row held: own tokens, then rows received."""
    num_near = near.row.shape[0]
    is_near = (near.sum_segment >= 0) & (near.sum_segment < num_near)
    is_relayed = relay.sum_segment >= 0
    counts = torch.cat((is_near.sum(dim=1), is_relayed.sum(dim=1)))
    items = (near.sum_segment[is_near], relay.sum_segment[is_relayed] + num_near)
    return offsets(counts), torch.cat(items)


def final_lists(
    near: Leg, far: Leg, lanes: Sequence[int], tokens: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Lists of the nodes' sums of every token, as rows of the staging memory of its slice.

    There each lane has `rows` rows; the own node's sums come behind the last lane.
    """
    num_near, segment = near.row.shape[0], near.sum_segment
    num_tokens, device = segment.shape[0], segment.device
    lane_of_peer = torch.zeros(far.peer_ptr.shape[0] - 1, dtype=torch.int64, device="cpu")
    lane_of_peer[list(lanes)] = torch.arange(len(lanes), device="cpu")
    lane = torch.repeat_interleave(lane_of_peer.to(device), far.peer_ptr.diff().to(device))
    # Segments of a lane and slice follow one another; each counts from the first of them.
    group = lane * (num_tokens + 1) + far.row // tokens
    number = torch.arange(far.row.shape[0], device=device)
    starts = torch.ones_like(number, dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    far_item = lane * rows + number - torch.where(starts, number, 0).cummax(0).values

    is_near = (segment >= 0) & (segment < num_near)
    # The own node is one term, however many of its ranks have a part in it.
    is_listed = (segment >= num_near) | (is_near & (is_near.cumsum(dim=1) == 1))
    own_item = len(lanes) * rows + torch.arange(num_tokens, device=device) % tokens
    item = own_item[:, None].expand_as(segment).clone()
    is_far = segment >= num_near
    item[is_far] = far_item[segment[is_far] - num_near]
    return offsets(is_listed.sum(dim=1)), item[is_listed]


def _ranges(leg: Leg, peer: int) -> tuple[slice, slice]:
    begin, end = leg.peer_ptr[peer : peer + 2].tolist()
    return slice(begin, end), slice(int(leg.slot_ptr[begin]), int(leg.slot_ptr[end]))
