"""Compact plans, as kernels make them, say the same as the planner's segments."""

from __future__ import annotations

from dataclasses import fields

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusco import Topology
from fusco.layout.compact import Links, links_len
from fusco.planner import plan_cluster, plan_compact
from fusco.testing.cases import expect_same
from fusco.testing.expand import expand_cluster


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Topology, list[Tensor], int]:
    """Ranks on up to three nodes, any placement, uneven tokens; alignment last."""
    num_ranks = draw(st.integers(1, 8))
    labels = draw(st.lists(st.integers(0, 2), min_size=num_ranks, max_size=num_ranks))
    numbers: dict[int, int] = {}
    nodes = tuple(numbers.setdefault(label, len(numbers)) for label in labels)
    num_experts, top_k = draw(st.integers(1, 20)), draw(st.integers(1, 16))
    ranks = st.integers(0, num_ranks - 1)
    placement = draw(st.lists(ranks, min_size=num_experts, max_size=num_experts))
    topology = Topology(rank=0, node_of_rank=nodes, rank_of_expert=tuple(placement))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = draw(st.lists(st.integers(0, 12), min_size=num_ranks, max_size=num_ranks))
    lowest = draw(st.sampled_from([-1, 0, num_experts - 1]))
    routing = [torch.randint(lowest, num_experts, (t, top_k), generator=generator) for t in tokens]
    return topology, routing, draw(st.sampled_from([1, 1, 4, 128]))


@given(cluster=clusters(), spare=st.integers(0, 3))
def test_expanded_they_equal_the_planner(
    cluster: tuple[Topology, list[Tensor], int], spare: int
) -> None:
    topology, routing, alignment = cluster
    max_tokens = max(map(len, routing)) + spare
    compact = plan_compact(routing, topology, max_tokens=max_tokens, alignment=alignment)
    want, _ = plan_cluster(routing, topology, alignment=alignment)
    for got, expected in zip(expand_cluster(compact, topology), want, strict=True):
        for one, other in zip(got.to_tensors(), expected.to_tensors(), strict=True):
            expect_same(one, other, "a part of the plan")


@given(cluster=clusters())
def test_returned_partials_have_places_of_their_own(
    cluster: tuple[Topology, list[Tensor], int],
) -> None:
    topology, routing, _ = cluster
    max_tokens, top_k = max(1, *map(len, routing)), routing[0].shape[1]
    plans = plan_compact(routing, topology, max_tokens=max_tokens)
    links = []
    for plan, idx in zip(plans, routing, strict=True):
        assert len(plan.links) == links_len(len(idx), topology.num_ranks, max_tokens, top_k)
        links.append(Links.split(plan.links, len(idx), topology.num_ranks, top_k))
    for me, mine in enumerate(links):
        taken: list[int] = []
        for rank, theirs in enumerate(links):
            if rank != me:
                # Where a rank puts its partials is where their receiver looks for them.
                assert theirs.return_at[me] == mine.return_from[rank]
                begin = int(mine.return_from[rank])
                taken += range(begin, begin + int(mine.sends[rank]))
        assert sorted(taken) == list(range(len(taken)))
        assert len(taken) <= max_tokens * min(top_k, topology.num_ranks - 1)


def test_links_are_joined_as_they_are_split() -> None:
    size = links_len(3, 2, 5, 4)
    links = Links.split(torch.arange(size), 3, 2, 4)
    assert links.join().tolist() == list(range(size))
    assert all(getattr(links, field.name).numel() for field in fields(links))
