"""Plans of the CPU engine: what is per token is compiled, the rest is the planner's own."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from fusco.engines.base import World
from fusco.engines.cpu.kernels.plan import count_pairs, describe, name_rows
from fusco.layout.blocks import Ints
from fusco.planner import Sends, expert_layout, measure_traffic, offsets
from fusco.types import Arrival, Counts, Leg, SegmentPlan

_LEG_FIELDS = tuple(field.name for field in fields(Leg) if field.name != "peer_ptr")


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


def plan_sends(topk_idx: Tensor, counts: Counts, world: World) -> Sends:
    """What `fusco.planner.plan_sends` returns for one level."""
    topology, rank = world.topology, world.topology.rank
    facts = topology.tensors("cpu")
    traffic = measure_traffic(
        counts, topology, alignment=world.alignment, two_level=False, ablation=world.ablation
    )
    next_slot = torch.empty_like(facts.rank_of_expert)
    next_slot[facts.device_major] = traffic.expert_start
    next_slot += counts.pairs[:rank].sum(dim=0)
    peer_ptr = offsets(traffic.direct.segments[rank])
    described = describe(
        topk_idx.contiguous().numpy(),
        facts.rank_of_expert.numpy(),
        facts.node_of_rank.numpy(),
        facts.order_of_rank.numpy(),
        topology.num_nodes,
        next_slot.numpy(),
        peer_ptr.numpy(),
        offsets(traffic.direct.pairs[rank]).numpy(),
        world.ablation.deduplicate,
    )
    tokens_per_expert, expert_offsets = expert_layout(counts, traffic, topology)
    return Sends(
        traffic=traffic,
        tokens_per_expert=tokens_per_expert,
        expert_offsets=expert_offsets,
        direct=Leg(
            **dict(zip(_LEG_FIELDS, map(torch.from_numpy, described), strict=True)),
            peer_ptr=peer_ptr,
        ),
        forward=None,
    )


def finish(identity: Tensor, sends: Sends, arrival: Arrival, rank: int) -> SegmentPlan:
    """What `fusco.planner.plan.finish` returns for one level."""
    num_rows = int(sends.traffic.rows[rank])
    rows: Ints = name_rows(arrival.slot_ptr.numpy(), arrival.slot.numpy(), np.int64(num_rows))
    return SegmentPlan(
        identity=identity,
        tokens_per_expert=sends.tokens_per_expert,
        expert_offsets=sends.expert_offsets,
        row_segment=torch.from_numpy(rows),
        send=sends.direct,
        arrival=arrival,
        forwarding=None,
    )
