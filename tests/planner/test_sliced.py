"""The compiled two-level planner says, bit for bit, what the one in torch says."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusco import Ablation, Topology
from fusco.engines.cpu.sliced import CompiledPlanner
from fusco.engines.sliced import SlicedPlanner
from fusco.engines.two_level.lanes import lanes_of
from fusco.engines.two_level.plans import (
    Hops,
    node_lists,
    pack_lists,
    unpack_lists,
)
from fusco.engines.two_level.torch_planner import TorchPlanner
from fusco.legs import Arrival, Counts, Leg
from fusco.planner import Sends
from tests.planner.test_delivery import clusters


def world_of(topology: Topology, alignment: int, ablation: Ablation, top_k: int) -> Any:
    return SimpleNamespace(topology=topology, alignment=alignment, ablation=ablation, top_k=top_k)


def expect_equal(got: object, expected: object) -> None:
    if isinstance(got, Tensor):
        assert isinstance(expected, Tensor)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(got, tuple):
        assert isinstance(expected, tuple)
        for one, other in zip(got, expected, strict=True):
            expect_equal(one, other)
    elif is_dataclass(got):
        for field in fields(got):
            expect_equal(getattr(got, field.name), getattr(expected, field.name))
    else:
        assert got == expected


@given(clusters(), st.booleans(), st.integers(1, 4))
def test_same_as_in_torch(
    cluster: tuple[Topology, list[Tensor], int], deduplicate: bool, tokens: int
) -> None:
    topology, routing, alignment = cluster
    ablation, top_k = Ablation(deduplicate=deduplicate), routing[0].shape[1]
    worlds = [
        world_of(topology.seen_from(rank), alignment, ablation, top_k)
        for rank in range(topology.num_ranks)
    ]
    pairs_of = [(CompiledPlanner(world), TorchPlanner(world)) for world in worlds]

    def both(rank: int, name: str, *arguments: Any) -> Any:
        got, expected = (getattr(planner, name)(*arguments) for planner in pairs_of[rank])
        expect_equal(got, expected)
        return got

    ranks = range(topology.num_ranks)
    counted = [[each.count(routing[rank]) for each in pairs_of[rank]] for rank in ranks]
    for got, expected in counted:
        expect_equal(got.packed, expected.packed)
    counts = Counts.split(
        torch.stack([each.packed for each, _ in counted]),
        topology.num_experts,
        topology.num_ranks,
        topology.num_nodes,
    )

    def plan_sends(rank: int) -> Sends:
        planners: tuple[SlicedPlanner, ...] = pairs_of[rank]
        got, expected = (
            planner.plan_sends(each, counts)
            for planner, each in zip(planners, counted[rank], strict=True)
        )
        expect_equal(got, expected)
        return got

    sends = [plan_sends(rank) for rank in ranks]
    hops = Hops.of(sends[0].traffic)
    rows = tokens if deduplicate else tokens * top_k
    received: list[tuple[Arrival, Tensor]] = []
    relays: list[Leg] = []
    for rank in ranks:
        packed = [pack_lists(_far(each), rank, tokens) for each in sends]
        received.append(unpack_lists(packed, hops.far, rank))
        relays.append(both(rank, "plan_relay", received[rank][0], hops.relay))
        near, far = sends[rank].direct, _far(sends[rank])
        both(rank, "held_lists", near, relays[rank])
        lanes = lanes_of(far.peer_ptr, worlds[rank].topology, away=1)
        both(rank, "final_lists", near, far, lanes, tokens, rows)
    for rank in ranks:
        node = [mate for mate in ranks if topology.node_of_rank[mate] == worlds[rank].topology.node]
        lists = []
        for mate in node:
            near, in_slice = sends[mate].direct, received[mate][1]
            lists.append(node_lists(near, near.row // tokens, rank))
            lists.append(node_lists(relays[mate], in_slice[relays[mate].row], rank))
        both(rank, "read_partials", torch.cat(lists), hops.near, hops.relay, node)


def _far(sends: Sends) -> Leg:
    assert sends.forward is not None
    return sends.forward
