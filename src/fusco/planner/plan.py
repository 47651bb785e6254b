"""From routing and everybody's counts to a `SegmentPlan` (FUSCO, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusco.legs import Arrival, Counts, Forwarding, Leg
from fusco.planner.counts import SortedPairs
from fusco.planner.legs import Descriptors, HopPairs, describe, mirror
from fusco.planner.sorting import offsets, stable_argsort
from fusco.planner.traffic import HopSizes, Traffic, measure_traffic
from fusco.plans import SegmentPlan
from fusco.topology import Topology
from fusco.types import Ablation


@dataclass(frozen=True, kw_only=True, eq=False)
class Sends:
    """What a rank can plan before the slot lists of others arrive.

    Attributes:
        traffic: sizes of every hop.
        tokens_per_expert: int64 `[L]`.
        expert_offsets: int32 `[L + 1]`.
        direct: expert-level descriptors to ranks reached directly.
        forward: node-level forwarding descriptors; None in one-level plans.
    """

    traffic: Traffic
    tokens_per_expert: Tensor
    expert_offsets: Tensor
    direct: Leg
    forward: Leg | None


def plan_sends(
    pairs: SortedPairs,
    counts: Counts,
    topology: Topology,
    *,
    alignment: int = 1,
    two_level: bool = False,
    ablation: Ablation = Ablation(),  # noqa: B008 - frozen
) -> Sends:
    """Descriptors of everything that `topology.rank` sends of its own tokens.

    Args:
        pairs: this rank's routing.
        counts: of all ranks, on the device of `pairs`.
        topology: ranks, nodes and placement.
        alignment: every expert's rows are padded to a multiple of it.
        two_level: send through forwarders what goes to other nodes.
        ablation: mechanisms that are switched off.
    """
    traffic = measure_traffic(
        counts, topology, alignment=alignment, two_level=two_level, ablation=ablation
    )
    rank, num_ranks = topology.rank, topology.num_ranks
    num_tokens, top_k = pairs.pair.shape
    slot = _final_slots(pairs, counts, traffic, topology)
    near = pairs.rank
    if two_level:
        near = near.masked_fill(pairs.node != topology.node, num_ranks)
    is_first, is_first_far = pairs.is_first_of_rank, pairs.is_first_of_node
    if not ablation.deduplicate:
        is_first = is_first_far = pairs.rank != num_ranks
    flat_pair = pairs.pair.flatten()
    hop = HopPairs(
        peer=near.flatten(),
        is_first=is_first.flatten(),
        row=torch.div(flat_pair, top_k, rounding_mode="floor"),
        slot=slot[flat_pair],
        pair=flat_pair,
        target=pairs.rank.flatten(),
    )
    direct = describe(hop, traffic.direct, rank)
    segments = direct.opened
    forward: Leg | None = None
    if traffic.forward is not None and traffic.through is not None:
        node = topology.tensors(near.device).node_of_rank
        through = traffic.through[rank].masked_fill(node == topology.node, num_ranks)
        through = torch.cat((through, through.new_tensor([num_ranks])))
        far_hop = HopPairs(
            peer=through[pairs.rank].flatten(),
            is_first=is_first_far.flatten(),
            row=hop.row,
            slot=hop.slot,
            pair=flat_pair,
            target=hop.target,
        )
        far = describe(far_hop, traffic.forward, rank)
        segments = torch.where(far.opened >= 0, far.opened + direct.row.shape[0], segments)
        # Sums over both hops are in the direct leg.
        nothing = segments.new_full((num_tokens, top_k), -1)
        forward = _leg(far, nothing, nothing.clone())
    tokens_per_expert, expert_offsets = expert_layout(counts, traffic, topology)
    return Sends(
        traffic=traffic,
        tokens_per_expert=tokens_per_expert,
        expert_offsets=expert_offsets,
        direct=_leg(direct, segments.view(num_tokens, top_k), pairs.node),
        forward=forward,
    )


def expert_layout(counts: Counts, traffic: Traffic, topology: Topology) -> tuple[Tensor, Tensor]:
    """This rank's tokens per expert, int64 `[L]`, and expert offsets, int32 `[L + 1]`."""
    rank = topology.rank
    own = slice(topology.first_local, topology.first_local + topology.num_local_experts[rank])
    device_major = topology.tensors(counts.pairs.device).device_major
    ends = (traffic.expert_start[own], traffic.rows[rank : rank + 1])
    return counts.pairs[:, device_major[own]].sum(dim=0), torch.cat(ends).to(torch.int32)


def _final_slots(
    pairs: SortedPairs, counts: Counts, traffic: Traffic, topology: Topology
) -> Tensor:
    """int64 `[T * K]`: the expert-major slot of each pair on its expert's rank; -1 for none.

    Rows of an expert are ordered by source rank, token and k.
    """
    facts = topology.tensors(pairs.expert.device)
    mine = counts.pairs[topology.rank][facts.device_major]
    before = counts.pairs[: topology.rank].sum(dim=0)[facts.device_major]
    start = offsets(mine)
    place = facts.place_of_expert[pairs.expert.flatten()]
    order = stable_argsort(place, topology.num_experts + 1)[: int(start[-1])]
    shift = traffic.expert_start + before - start[:-1]
    slot = torch.full_like(place, -1)
    slot[order] = shift[place[order]] + torch.arange(order.shape[0], device=order.device)
    return slot


def plan_relay(arrival: Arrival, sizes: HopSizes, topology: Topology, top_k: int) -> Leg:
    """Expert-level distribution descriptors of a forwarder, for the rows it has received.

    Args:
        arrival: the rows received from other nodes.
        sizes: of the relay hop, all ranks.
        topology: as seen from the forwarder.
        top_k: K, which bounds the ranks a row can go to.
    """
    per_row = arrival.slot_ptr.diff()
    num_rows, num_pairs = per_row.shape[0], arrival.slot.shape[0]
    device = arrival.slot.device
    row = torch.repeat_interleave(torch.arange(num_rows, device=device), per_row)
    is_first = torch.ones(num_pairs, dtype=torch.bool, device=device)
    is_first[1:] = (row[1:] != row[:-1]) | (arrival.target[1:] != arrival.target[:-1])
    hop = HopPairs(
        peer=arrival.target,
        is_first=is_first,
        row=row,
        slot=arrival.slot,
        pair=torch.arange(num_pairs, device=device),
        target=arrival.target,
    )
    relay = describe(hop, sizes, topology.rank)
    segments = row.new_full((num_rows, top_k), -1)
    segments[row, hop.pair - arrival.slot_ptr[:-1][row]] = relay.opened
    return _leg(relay, segments, torch.full_like(segments, topology.node))


def assemble(sizes: HopSizes, rank: int, shipped: list[tuple[Tensor, Tensor, Tensor]]) -> Arrival:
    """The receiver's mirror of a hop, from what each rank shipped, in rank order.

    Args:
        sizes: of this hop, all ranks.
        rank: the receiver.
        shipped: for each rank, slots per segment `[n]`, slots `[m]` and their ranks `[m]`.
    """
    parts = [torch.cat(part) for part in zip(*shipped, strict=True)]
    return mirror(sizes, rank, parts[0], parts[1], parts[2])


def assemble_rows(sends: Sends, rank: int, arrivals: list[Arrival]) -> Tensor:
    """int64 `[R]`: the segment that fills each row, counted over all `arrivals`; -1: padding."""
    num_rows = int(sends.traffic.rows[rank])
    rows = sends.tokens_per_expert.new_full((num_rows,), -1)
    base = 0
    for arrival in arrivals:
        per_segment = arrival.slot_ptr.diff()
        numbers = torch.arange(base, base + per_segment.shape[0], device=rows.device)
        rows[arrival.slot] = torch.repeat_interleave(numbers, per_segment)
        base += per_segment.shape[0]
    return rows


def finish(
    identity: Tensor, sends: Sends, arrival: Arrival, forwarding: Forwarding | None, rank: int
) -> SegmentPlan:
    """The plan, once what others send is known."""
    arrivals = [arrival] if forwarding is None else [arrival, forwarding.relay_arrival]
    return SegmentPlan(
        identity=identity,
        tokens_per_expert=sends.tokens_per_expert,
        expert_offsets=sends.expert_offsets,
        row_segment=assemble_rows(sends, rank, arrivals),
        send=sends.direct,
        arrival=arrival,
        forwarding=forwarding,
    )


def _leg(descriptors: Descriptors, sum_segment: Tensor, sum_node: Tensor) -> Leg:
    return Leg(
        peer_ptr=descriptors.peer_ptr,
        row=descriptors.row,
        slot_ptr=descriptors.slot_ptr,
        slot=descriptors.slot,
        pair=descriptors.pair,
        target=descriptors.target,
        sum_segment=sum_segment,
        sum_node=sum_node,
    )
