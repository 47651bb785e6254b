"""Compact plans written out as the segment descriptors that the planner would make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusco.layout.compact import Links
from fusco.legs import Arrival, Leg
from fusco.planner import offsets
from fusco.plans import CompactPlan, SegmentPlan
from fusco.topology import Topology


def expand_cluster(plans: Sequence[CompactPlan], topology: Topology) -> list[SegmentPlan]:
    """What `planner.plan_cluster` says, from the arrays of the kernels alone.

    Args:
        plans: of all ranks, on the CPU.
        topology: as seen from any rank.
    """
    num_ranks = topology.num_ranks
    links = [
        Links.split(plan.links.long(), plan.num_tokens, num_ranks, plan.top_k) for plan in plans
    ]
    segments = torch.stack([each.sends for each in links])
    pairs = torch.stack(
        [
            torch.bincount(plan.pairs[0].flatten().long() + 1, minlength=num_ranks + 1)[1:]
            for plan in plans
        ]
    )
    return [
        _expand(plan, links[rank], rank, topology, segments, pairs)
        for rank, plan in enumerate(plans)
    ]


def _expand(
    plan: CompactPlan, links: Links, rank: int, topology: Topology, segments: Tensor, pairs: Tensor
) -> SegmentPlan:
    arrival = _arrival(links, rank, segments, pairs)
    row_segment = torch.full((plan.num_rows,), -1)
    per_segment = arrival.slot_ptr.diff()
    row_segment[arrival.slot] = torch.repeat_interleave(torch.arange(len(per_segment)), per_segment)
    return SegmentPlan(
        identity=plan.identity,
        tokens_per_expert=plan.tokens_per_expert,
        expert_offsets=plan.expert_offsets,
        row_segment=row_segment,
        send=_leg(plan, links, topology),
        arrival=arrival,
        forwarding=None,
    )


def _leg(plan: CompactPlan, links: Links, topology: Topology) -> Leg:
    facts, num_ranks, top_k = topology.tensors("cpu"), topology.num_ranks, plan.top_k
    rank, slot = plan.pairs.long()
    peer_ptr = offsets(links.sends)
    number = links.token_segment + peer_ptr[:-1]  # counted over all peers
    row = torch.empty(int(peer_ptr[-1]), dtype=torch.int64)
    tokens, peers = (links.token_segment >= 0).nonzero(as_tuple=True)
    row[number[tokens, peers]] = tokens

    flat_rank, flat_pair = rank.flatten(), torch.arange(rank.numel())
    is_there = flat_rank >= 0
    segment = number[flat_pair // top_k, flat_rank]
    order = flat_pair[is_there][torch.argsort(segment[is_there], stable=True)]
    # Sums go by (node, rank), pairs of no expert last.
    position = torch.cat((facts.order_of_rank, facts.order_of_rank.new_tensor([num_ranks])))[rank]
    by_rank = torch.argsort(position, dim=1, stable=True)
    sorted_rank = rank.gather(1, by_rank)
    opens = sorted_rank >= 0
    opens[:, 1:] &= sorted_rank[:, 1:] != sorted_rank[:, :-1]
    sum_segment = segment.view_as(rank).gather(1, by_rank).masked_fill(~opens, -1)
    node = torch.cat((facts.node_of_rank, facts.node_of_rank.new_tensor([topology.num_nodes])))
    return Leg(
        peer_ptr=peer_ptr,
        row=row,
        slot_ptr=offsets(torch.bincount(segment[is_there], minlength=len(row))),
        slot=slot.flatten()[order],
        pair=order,
        target=flat_rank[order],
        sum_segment=sum_segment,
        sum_node=node[sorted_rank],
    )


def _arrival(links: Links, rank: int, segments: Tensor, pairs: Tensor) -> Arrival:
    counts = links.arrivals.tolist()
    lists = torch.cat([slots[:n] for slots, n in zip(links.arrival_slot, counts, strict=True)])
    slot = lists[lists >= 0]
    return Arrival(
        peer_ptr=offsets(links.arrivals),
        peer_start=segments[:, :rank].sum(dim=1),
        pair_start=pairs[:, :rank].sum(dim=1),
        slot_ptr=offsets((lists >= 0).sum(dim=1)),
        slot=slot,
        target=torch.full_like(slot, rank),
    )
