"""Plans of whole clusters deliver every pair to the slot that the contract says, by any road."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusco import Ablation, Topology
from fusco.cost import Hardware, predict
from fusco.legs import Arrival, Leg
from fusco.planner import plan_cluster
from fusco.plans import SegmentPlan

Pair = tuple[int, int, int]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Topology, list[Tensor], int]:
    """Ranks on up to four nodes, any placement, uneven tokens; alignment last."""
    num_ranks = draw(st.integers(1, 7))
    labels = draw(st.lists(st.integers(0, 3), min_size=num_ranks, max_size=num_ranks))
    numbers: dict[int, int] = {}
    nodes = tuple(numbers.setdefault(label, len(numbers)) for label in labels)
    num_experts, top_k = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    ranks = st.integers(0, num_ranks - 1)
    placement = draw(st.lists(ranks, min_size=num_experts, max_size=num_experts))
    topology = Topology(rank=0, node_of_rank=nodes, rank_of_expert=tuple(placement))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = draw(st.lists(st.integers(0, 9), min_size=num_ranks, max_size=num_ranks))
    routing = [torch.randint(-1, num_experts, (t, top_k), generator=generator) for t in tokens]
    return topology, routing, draw(st.sampled_from([1, 1, 4]))


def expected_rows(
    topology: Topology, routing: list[Tensor], alignment: int, rank: int
) -> list[Pair | None]:
    """(source rank, token, k) of every row of a rank; None: padding."""
    rows: list[Pair | None] = []
    for expert, owner in enumerate(topology.rank_of_expert):
        if owner != rank:
            continue
        mine: list[Pair | None] = [
            (source, token, k)
            for source, topk_idx in enumerate(routing)
            for token, choices in enumerate(topk_idx.tolist())
            for k, choice in enumerate(choices)
            if choice == expert
        ]
        rows += mine + [None] * (-len(mine) % alignment)
    return rows


def segments_to(leg: Leg, peer: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Of each segment for a peer: its row, and (slot, pair, target) of each of its slots."""
    ptr = leg.slot_ptr.tolist()
    entries = list(zip(leg.slot.tolist(), leg.pair.tolist(), leg.target.tolist(), strict=True))
    begin, end = leg.peer_ptr[peer : peer + 2].tolist()
    return [(int(leg.row[i]), entries[ptr[i] : ptr[i + 1]]) for i in range(begin, end)]


def delivered_rows(plans: list[SegmentPlan], top_k: int, rank: int) -> list[Pair | None]:
    """What executing the descriptors of all ranks puts into each row of one rank."""
    rows: list[Pair | None] = [None] * plans[rank].num_rows

    def fill(slot: int, pair: Pair) -> None:
        assert rows[slot] is None
        rows[slot] = pair

    for source, plan in enumerate(plans):
        for token, slots in segments_to(plan.send, rank):
            for slot, pair, target in slots:
                assert (target, pair // top_k) == (rank, token)
                fill(slot, (source, token, pair % top_k))
    for forwarder, plan in enumerate(plans):
        if plan.forwarding is None:
            continue
        held = [
            (source, token, slots)
            for source, other in enumerate(plans)
            if other.forwarding is not None
            for token, slots in segments_to(other.forwarding.send, forwarder)
        ]
        first = plan.forwarding.arrival.slot_ptr.tolist()
        for row, slots in segments_to(plan.forwarding.relay, rank):
            source, token, shipped = held[row]
            for slot, pair, target in slots:
                sent_slot, sent_pair, sent_target = shipped[pair - first[row]]
                assert (slot, target, rank) == (sent_slot, sent_target, target)
                fill(slot, (source, token, sent_pair % top_k))
    return rows


def assert_mirrored(legs: list[Leg], arrivals: list[Arrival]) -> None:
    for rank, arrival in enumerate(arrivals):
        for peer, leg in enumerate(legs):
            begin, end = leg.peer_ptr[rank : rank + 2].tolist()
            at, until = arrival.peer_ptr[peer : peer + 2].tolist()
            assert until - at == end - begin
            assert int(arrival.peer_start[peer]) == begin
            assert int(arrival.pair_start[peer]) == int(leg.slot_ptr[begin])
            sent = leg.slot[leg.slot_ptr[begin] : leg.slot_ptr[end]]
            assert torch.equal(arrival.slot[arrival.slot_ptr[at] : arrival.slot_ptr[until]], sent)


@given(clusters(), st.booleans(), st.booleans(), st.booleans())
def test_every_pair_lands_in_its_slot(
    cluster: tuple[Topology, list[Tensor], int], two_level: bool, dedup: bool, balance: bool
) -> None:
    topology, routing, alignment = cluster
    ablation = Ablation(deduplicate=dedup, balance=balance)
    plans, sends = plan_cluster(
        routing, topology, alignment=alignment, two_level=two_level, ablation=ablation
    )
    top_k = routing[0].shape[1]
    for rank, plan in enumerate(plans):
        expected = expected_rows(topology, routing, alignment, rank)
        assert delivered_rows(plans, top_k, rank) == expected
        assert (plan.row_segment < 0).tolist() == [pair is None for pair in expected]
        assert int(sends[rank].traffic.rows[rank]) == len(expected) == int(plan.expert_offsets[-1])
        assert int(plan.tokens_per_expert.sum()) == sum(pair is not None for pair in expected)
    assert_mirrored([plan.send for plan in plans], [plan.arrival for plan in plans])
    levels = [plan.forwarding for plan in plans if plan.forwarding is not None]
    assert len(levels) == (len(plans) if two_level else 0)
    assert_mirrored([level.send for level in levels], [level.arrival for level in levels])
    assert_mirrored([level.relay for level in levels], [level.relay_arrival for level in levels])


@given(clusters())
def test_one_copy_a_node_and_a_rank(cluster: tuple[Topology, list[Tensor], int]) -> None:
    topology, routing, alignment = cluster
    plans, sends = plan_cluster(routing, topology, alignment=alignment, two_level=True)
    for rank, plan in enumerate(plans):
        for peer in range(topology.num_ranks):
            rows = [row for row, _ in segments_to(plan.send, peer)]
            assert len(set(rows)) == len(rows)
        if plan.forwarding is not None:
            far = [
                (topology.node_of_rank[peer], row)
                for peer in range(topology.num_ranks)
                for row, _ in segments_to(plan.forwarding.send, peer)
            ]
            assert len(set(far)) == len(far)
            assert all(node != topology.node_of_rank[rank] for node, _ in far)
    hardware = Hardware(node_bytes_per_s=4e11, network_bytes_per_s=5e10)
    cost = predict(sends[0].traffic, topology, 100, hardware)
    for rank, plan in enumerate(plans):
        far_bytes = 0
        if plan.forwarding is not None:
            far_bytes = 100 * plan.forwarding.send.row.shape[0]
        assert int(cost.network_bytes[rank].sum()) == far_bytes
    assert cost.time_s == max(cost.node_s, cost.network_s)


@given(clusters(), st.booleans())
def test_plans_survive_as_tensors(
    cluster: tuple[Topology, list[Tensor], int], two_level: bool
) -> None:
    topology, routing, _ = cluster
    plans, _ = plan_cluster(routing, topology, two_level=two_level)
    for plan in plans:
        flat = plan.to_tensors()
        again = SegmentPlan.from_tensors(flat)
        assert (again.forwarding is None) == (plan.forwarding is None)
        assert all(a is b for a, b in zip(flat, again.to_tensors(), strict=True))


def test_a_thousand_ranks() -> None:
    """1,024 ranks in 128 nodes, 2,048 experts: one rank's plan, from the counts of all."""
    from fusco.legs import Counts
    from fusco.planner import count_pairs, plan_sends, sort_pairs
    from fusco.topology import contiguous_placement

    num_ranks, num_experts = 1024, 2048
    topology = Topology(
        rank=77,
        node_of_rank=tuple(rank // 8 for rank in range(num_ranks)),
        rank_of_expert=contiguous_placement(num_experts, num_ranks),
    )
    generator = torch.Generator().manual_seed(0)
    pairs = sort_pairs(torch.randint(0, num_experts, (512, 8), generator=generator), topology)
    packed = count_pairs(pairs, topology)
    counts = Counts.split(packed.expand(num_ranks, -1), num_experts, num_ranks, topology.num_nodes)
    sends = plan_sends(pairs, counts, topology, two_level=True)
    assert sends.forward is not None
    assert int(sends.traffic.rows.sum()) == num_ranks * 512 * 8
    assert sends.direct.slot.shape[0] + sends.forward.slot.shape[0] == 512 * 8
    assert sends.traffic.forward is not None
    # One copy a (token, node), and each forwarder of a node serves one rank of this one.
    to_nodes = sends.traffic.forward.segments[77]
    assert int(to_nodes.sum()) == sends.forward.row.shape[0]
    assert int((to_nodes > 0).sum()) <= 127
