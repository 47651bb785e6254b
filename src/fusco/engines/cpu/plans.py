"""Plans of the CPU engine: what `fusco.planner` makes of one level, compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusco.engines.base import World
from fusco.engines.cpu.kernels.plan import count_pairs, describe, measure_traffic, read_arrival
from fusco.layout.blocks import Ints
from fusco.types import Arrival, Leg, SegmentPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class Outline:
    """What a rank can plan before the slot lists of others arrive.

    Attributes:
        segments: int64 `[P, P]`, between all ranks: sender, receiver.
        pairs: int64 `[P, P]`, likewise.
        rows: int64 `[P]`, rows each rank receives, padding counted.
        tokens_per_expert: int64 `[L]`.
        expert_offsets: int32 `[L + 1]`.
        leg: what this rank sends.
    """

    segments: Ints
    pairs: Ints
    rows: Ints
    tokens_per_expert: Tensor
    expert_offsets: Tensor
    leg: Leg


def count(topk_idx: Tensor, world: World) -> Ints:
    """This rank's packed counts, int64 `[E + P + N]`."""
    facts = world.topology.tensors("cpu")
    packed: Ints = count_pairs(
        topk_idx.contiguous().numpy(),
        facts.rank_of_expert.numpy(),
        facts.node_of_rank.numpy(),
        world.topology.num_nodes,
    )
    return packed


def outline(topk_idx: Tensor, counts: Ints, world: World) -> Outline:
    """What `fusco.planner.plan_sends` says for one level.

    Args:
        topk_idx: int64 `[T, K]`.
        counts: int64 `[P, E + P + N]`, packed, of all ranks.
        world: of the engine.
    """
    topology, rank = world.topology, world.topology.rank
    facts, deduplicate = topology.tensors("cpu"), world.ablation.deduplicate
    rank_of_expert = facts.rank_of_expert.numpy()
    segments, pairs, rows, first_slot, tokens_per_expert, expert_offsets = measure_traffic(
        counts, rank_of_expert, facts.device_major.numpy(), rank, world.alignment, deduplicate
    )
    leg = describe(
        topk_idx.contiguous().numpy(),
        rank_of_expert,
        facts.node_of_rank.numpy(),
        facts.order_of_rank.numpy(),
        topology.num_nodes,
        first_slot,
        segments[rank],
        pairs[rank],
        deduplicate,
    )
    peer_ptr, row, slot_ptr, slot, pair, target, sum_segment, sum_node = map(torch.from_numpy, leg)
    return Outline(
        segments=segments,
        pairs=pairs,
        rows=rows,
        tokens_per_expert=torch.from_numpy(tokens_per_expert),
        expert_offsets=torch.from_numpy(expert_offsets),
        leg=Leg(
            peer_ptr=peer_ptr,
            row=row,
            slot_ptr=slot_ptr,
            slot=slot,
            pair=pair,
            target=target,
            sum_segment=sum_segment,
            sum_node=sum_node,
        ),
    )


def finish(
    identity: Tensor, sends: Outline, slots_per_segment: Ints, slot: Ints, rank: int
) -> SegmentPlan:
    """The plan, once the slot lists of all ranks are there: slots of each segment, and slots."""
    arrival = read_arrival(
        slots_per_segment, slot, sends.segments, sends.pairs, rank, sends.rows[rank]
    )
    peer_ptr, peer_start, pair_start, slot_ptr, slots, target, row_segment = map(
        torch.from_numpy, arrival
    )
    return SegmentPlan(
        identity=identity,
        tokens_per_expert=sends.tokens_per_expert,
        expert_offsets=sends.expert_offsets,
        row_segment=row_segment,
        send=sends.leg,
        arrival=Arrival(
            peer_ptr=peer_ptr,
            peer_start=peer_start,
            pair_start=pair_start,
            slot_ptr=slot_ptr,
            slot=slots,
            target=target,
        ),
        forwarding=None,
    )
