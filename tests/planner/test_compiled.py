"""The CPU engine's compiled planner says, bit for bit, what the planner says."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusco import Ablation, Topology
from fusco.engines.cpu import plans
from fusco.legs import Arrival, Leg
from fusco.planner import count_pairs, plan_cluster, sort_pairs
from tests.planner.test_delivery import clusters


@given(clusters(), st.booleans())
def test_same_as_the_planner(cluster: tuple[Topology, list[Tensor], int], dedup: bool) -> None:
    topology, routing, alignment = cluster
    ablation = Ablation(deduplicate=dedup)
    expected, planned = plan_cluster(routing, topology, alignment=alignment, ablation=ablation)
    packed = torch.stack([count_pairs(sort_pairs(each, topology), topology) for each in routing])
    traffic = planned[0].traffic
    for rank, (topk_idx, plan) in enumerate(zip(routing, expected, strict=True)):
        world: Any = SimpleNamespace(
            topology=topology.seen_from(rank), alignment=alignment, ablation=ablation
        )
        tables = plans.Tables.of(world)
        counted, low, high = plans.count(topk_idx, tables, topology.num_nodes)
        assert np.array_equal(counted, packed[rank].numpy())
        assert topk_idx.numel() == 0 or (low, high) == tuple(map(int, topk_idx.aminmax()))
        sends = plans.outline(topk_idx, packed.numpy(), tables, world)
        assert np.array_equal(sends.segments, traffic.direct.segments.numpy())
        assert np.array_equal(sends.pairs, traffic.direct.pairs.numpy())
        assert np.array_equal(sends.rows, traffic.rows.numpy())
        arrival = plan.arrival
        lists = arrival.slot_ptr.diff().numpy(), arrival.slot.numpy()
        got = plans.finish(plan.identity, sends, *lists, rank).segments
        for field in fields(plan):
            one, other = getattr(got, field.name), getattr(plan, field.name)
            if isinstance(one, Leg | Arrival):
                for part in fields(one):
                    assert torch.equal(getattr(one, part.name), getattr(other, part.name))
            elif isinstance(one, Tensor):
                assert torch.equal(one, other), field.name
                assert one.dtype == other.dtype
