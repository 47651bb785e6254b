"""Algorithm 1 of the paper, by hand and by its promises."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusco import Topology
from fusco.legs import Counts
from fusco.planner import assign_forwarders, choose_forwarders
from fusco.planner.balance import assign_by_received, received_load


def counts_of(loads: list[list[int]]) -> Counts:
    """Counts in which rank p sends `loads[p][n]` tokens to node n."""
    num_ranks = len(loads)
    return Counts(
        pairs=torch.zeros(num_ranks, 1, dtype=torch.int64),
        tokens_to_rank=torch.zeros(num_ranks, num_ranks, dtype=torch.int64),
        tokens_to_node=torch.tensor(loads),
    )


def test_by_hand() -> None:
    """Two nodes of two. Loads 1 and 5 on node 0: order 1, 0. Loads 7 and 2 on node 1: order 2, 3,
    rotated by one: 3, 2. So the groups are {1, 3} and {0, 2}."""
    topology = Topology(rank=0, node_of_rank=(0, 0, 1, 1), rank_of_expert=(0,))
    counts = counts_of([[9, 1], [9, 5], [7, 9], [2, 9]])
    chosen = assign_forwarders(counts, topology, balance=True)
    assert chosen.tolist() == [[0, 2], [1, 3], [0, 2], [1, 3]]
    unbalanced = assign_forwarders(counts, topology, balance=False)
    assert unbalanced.tolist() == [[0, 2], [1, 3], [0, 2], [1, 3]]
    heavier = counts_of([[9, 6], [9, 5], [7, 9], [2, 9]])
    assert assign_forwarders(heavier, topology, balance=True).tolist() == [
        [0, 3],
        [1, 2],
        [1, 2],
        [0, 3],
    ]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.booleans())
def test_groups_take_one_rank_of_each_node(
    num_nodes: int, per_node: int, seed: int, balance: bool
) -> None:
    num_ranks = num_nodes * per_node
    nodes = tuple(rank // per_node for rank in range(num_ranks))
    topology = Topology(rank=0, node_of_rank=nodes, rank_of_expert=(0,))
    generator = torch.Generator().manual_seed(seed)
    loads = torch.randint(0, 9, (num_ranks, num_nodes), generator=generator).tolist()
    chosen = assign_forwarders(counts_of(loads), topology, balance=balance)
    for rank, row in enumerate(chosen.tolist()):
        assert row[nodes[rank]] == rank
        assert [nodes[forwarder] for forwarder in row] == list(range(num_nodes))
        # Ranks of a group are each other's forwarders.
        assert all(chosen[forwarder].tolist() == row for forwarder in row)


def test_the_heaviest_ranks_of_nodes_are_in_different_groups() -> None:
    topology = Topology(
        rank=0, node_of_rank=tuple(rank // 4 for rank in range(16)), rank_of_expert=(0,)
    )
    loads = [[100 if rank % 4 == 2 else 1] * 4 for rank in range(16)]
    chosen = assign_forwarders(counts_of(loads), topology, balance=True)
    groups = {tuple(chosen[rank].tolist()) for rank in (2, 6, 10, 14)}
    assert len(groups) == 4


def test_nodes_of_different_sizes_share_their_forwarders() -> None:
    topology = Topology(rank=0, node_of_rank=(0, 0, 0, 1), rank_of_expert=(0,))
    counts = counts_of([[0, 3], [0, 2], [0, 1], [4, 0]])
    for balance in (True, False):
        chosen = assign_forwarders(counts, topology, balance=balance)
        assert chosen[:, 1].tolist() == [3, 3, 3, 3]
        assert chosen[:3, 0].tolist() == [0, 1, 2]


def test_receivers_count_too_where_they_are_the_busier() -> None:
    """Both heavy senders to node 2 would meet at one of its ranks; Algorithm 1 does not see it."""
    topology = Topology(rank=0, node_of_rank=(0, 0, 1, 1, 2, 2), rank_of_expert=(0,))
    counts = counts_of([[0, 5, 90], [0, 6, 1], [5, 0, 1], [6, 0, 80], [3, 2, 0], [2, 3, 0]])
    algorithm = received_load(counts, topology, assign_forwarders(counts, topology, balance=True))
    chosen = choose_forwarders(counts, topology, balance=True)
    assert int(received_load(counts, topology, chosen).max()) <= int(algorithm.max())
    assert int(received_load(counts, topology, chosen).max()) < 100
    assert torch.equal(
        choose_forwarders(counts, topology, balance=False),
        assign_forwarders(counts, topology, balance=False),
    )


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**31))
def test_forwarders_by_received_are_of_their_nodes(sizes: list[int], seed: int) -> None:
    nodes = tuple(node for node, size in enumerate(sizes) for _ in range(size))
    topology = Topology(rank=0, node_of_rank=nodes, rank_of_expert=(0,))
    generator = torch.Generator().manual_seed(seed)
    loads = torch.randint(0, 9, (len(nodes), len(sizes)), generator=generator).tolist()
    counts = counts_of(loads)
    chosen = assign_by_received(counts, topology)
    for rank, row in enumerate(chosen.tolist()):
        assert row[nodes[rank]] == rank
        assert [nodes[forwarder] for forwarder in row] == list(range(len(sizes)))
    far = sum(n for rank, row in enumerate(loads) for m, n in enumerate(row) if m != nodes[rank])
    assert int(received_load(counts, topology, chosen).sum()) == far
    for node, size in enumerate(sizes):
        for other, senders in enumerate(sizes):
            if other != node:
                served = [
                    row[node] for row, at in zip(chosen.tolist(), nodes, strict=True) if at == other
                ]
                assert max(served.count(rank) for rank in served) <= -(-senders // size)
