"""Plans of the two-level engine on CPUs, compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusco.engines.base import World
from fusco.engines.cpu.kernels.plan import count_pairs
from fusco.engines.cpu.kernels.sliced import (
    describe_relay,
    describe_sends,
    list_final,
    list_held,
    sort_partials,
)
from fusco.engines.sliced import Counted, SlicedPlanner
from fusco.layout.blocks import Ints
from fusco.legs import Arrival, Counts, Leg, Partials
from fusco.planner import HopSizes, Sends, expert_layout, measure_traffic


class CompiledPlanner(SlicedPlanner):
    """See `SlicedPlanner`. Traffic, whose size does not depend on the tokens, is left to torch."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._topology = world.topology
        self._facts = world.topology.tensors("cpu")

    def count(self, topk_idx: Tensor) -> Counted:
        facts, topk_idx = self._facts, topk_idx.contiguous()
        packed, _, _ = count_pairs(
            topk_idx.numpy(),
            facts.rank_of_expert.numpy(),
            facts.node_of_rank.numpy(),
            self._topology.num_nodes,
        )
        return Counted(topk_idx=topk_idx, packed=torch.from_numpy(packed), pairs=None)

    def plan_sends(self, counted: Counted, counts: Counts) -> Sends:
        topology, facts, world = self._topology, self._facts, self._world
        rank = topology.rank
        traffic = measure_traffic(
            counts,
            topology,
            alignment=world.alignment,
            two_level=True,
            ablation=world.ablation,
        )
        assert traffic.forward is not None
        assert traffic.through is not None
        first_slot = counts.pairs[:rank].sum(dim=0)
        first_slot[facts.device_major] += traffic.expert_start
        near, far, sum_segment, sum_node = describe_sends(
            counted.topk_idx.numpy(),
            facts.rank_of_expert.numpy(),
            facts.node_of_rank.numpy(),
            facts.order_of_rank.numpy(),
            traffic.through[rank].numpy(),
            topology.node,
            topology.num_nodes,
            first_slot.numpy(),
            _sizes_from(traffic.direct, rank),
            _sizes_from(traffic.forward, rank),
            world.ablation.deduplicate,
        )
        nothing = np.full_like(sum_segment, -1)
        tokens_per_expert, expert_offsets = expert_layout(counts, traffic, topology)
        return Sends(
            traffic=traffic,
            tokens_per_expert=tokens_per_expert,
            expert_offsets=expert_offsets,
            direct=_leg(near, sum_segment, sum_node),
            forward=_leg(far, nothing, nothing.copy()),
        )

    def plan_relay(self, received: Arrival, sizes: HopSizes) -> Leg:
        leg, sum_segment, sum_node = describe_relay(
            received.slot_ptr.numpy(),
            received.slot.numpy(),
            received.target.numpy(),
            _sizes_from(sizes, self._topology.rank),
            self._topology.node,
            self._world.top_k,
        )
        return _leg(leg, sum_segment, sum_node)

    def held_lists(self, near: Leg, relay: Leg) -> tuple[Tensor, Tensor]:
        ptr, held = list_held(
            near.sum_segment.numpy(), near.row.shape[0], relay.sum_segment.numpy()
        )
        return torch.from_numpy(ptr), torch.from_numpy(held)

    def final_lists(
        self, near: Leg, far: Leg, lanes: Sequence[int], tokens: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        ptr, final = list_final(
            near.sum_segment.numpy(),
            near.row.shape[0],
            far.peer_ptr.numpy(),
            far.row.numpy(),
            np.array(lanes, dtype=np.int64),
            tokens,
            rows,
        )
        return torch.from_numpy(ptr), torch.from_numpy(final)

    def read_partials(
        self, lists: Tensor, near: HopSizes, relay: HopSizes, node: Sequence[int]
    ) -> Partials:
        sizes = (near.segments, near.pairs, relay.segments, relay.pairs)
        slice_ptr, target, place, slot_ptr, slot, pair_place = map(
            torch.from_numpy,
            sort_partials(
                lists.numpy(),
                *(np.ascontiguousarray(each.numpy()) for each in sizes),
                np.array(node, dtype=np.int64),
                self._topology.rank,
            ),
        )
        return Partials(
            slice_ptr=slice_ptr,
            target=target,
            place=place,
            slot_ptr=slot_ptr,
            slot=slot,
            pair_place=pair_place,
        )


def _sizes_from(sizes: HopSizes, rank: int) -> Ints:
    """Segments and pairs from one rank, `[2, P]`."""
    found: Ints = torch.stack((sizes.segments[rank], sizes.pairs[rank])).numpy()
    return found


def _leg(fields: tuple[Ints, ...], sum_segment: Ints, sum_node: Ints) -> Leg:
    peer_ptr, row, slot_ptr, slot, pair, target = map(torch.from_numpy, fields)
    return Leg(
        peer_ptr=peer_ptr,
        row=row,
        slot_ptr=slot_ptr,
        slot=slot,
        pair=pair,
        target=target,
        sum_segment=torch.from_numpy(sum_segment),
        sum_node=torch.from_numpy(sum_node),
    )
