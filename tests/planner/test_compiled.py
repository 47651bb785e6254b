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
from fusco.planner import count_pairs, plan_cluster, sort_pairs
from fusco.types import Arrival, Counts, Leg
from tests.planner.test_delivery import clusters


@given(clusters(), st.booleans())
def test_same_as_the_planner(cluster: tuple[Topology, list[Tensor], int], dedup: bool) -> None:
    topology, routing, alignment = cluster
    ablation = Ablation(deduplicate=dedup)
    expected, _ = plan_cluster(routing, topology, alignment=alignment, ablation=ablation)
    packed = torch.stack([count_pairs(sort_pairs(each, topology), topology) for each in routing])
    counts = Counts.split(packed, topology.num_experts, topology.num_ranks)
    for rank, (topk_idx, plan) in enumerate(zip(routing, expected, strict=True)):
        world: Any = SimpleNamespace(
            topology=topology.seen_from(rank), alignment=alignment, ablation=ablation
        )
        assert np.array_equal(plans.count(topk_idx, world), packed[rank].numpy())
        sends = plans.plan_sends(topk_idx, counts, world)
        got = plans.finish(plan.identity, sends, plan.arrival, rank)
        for field in fields(plan):
            one, other = getattr(got, field.name), getattr(plan, field.name)
            if isinstance(one, Leg | Arrival):
                for part in fields(one):
                    assert torch.equal(getattr(one, part.name), getattr(other, part.name))
            elif isinstance(one, Tensor):
                assert torch.equal(one, other), field.name
                assert one.dtype == other.dtype
