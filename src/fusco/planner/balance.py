"""The online load balancer: who forwards for whom (FUSCO, section 3.4, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusco.legs import Counts
from fusco.planner.sorting import offsets
from fusco.topology import Topology


def assign_forwarders(counts: Counts, topology: Topology, *, balance: bool) -> Tensor:
    """The forwarder of each rank on each node.

    Algorithm 1: sort the ranks of every node by descending cross-node load, rotate the order by
    the node's index, and let position i of every node form communication group i. Nodes of
    different sizes wrap around. Without `balance`, position is the place in the node.

    Returns:
        int64 `[P, N]`: the rank of node n that receives what rank p sends there; the own node's
        column is the rank itself.
    """
    facts = topology.tensors(counts.pairs.device)
    node = facts.node_of_rank
    size = torch.bincount(node, minlength=topology.num_nodes)
    start = offsets(size)[:-1]
    ranks = torch.arange(topology.num_ranks, device=node.device)
    by_load = torch.argsort(facts.order_of_rank)
    shift = torch.zeros_like(size)
    if balance:
        # Stable sorts, the last key first: (node, descending load, rank).
        load = cross_node_load(counts, topology)
        by_load = torch.argsort(-load, stable=True)
        by_load = by_load[torch.argsort(node[by_load], stable=True)]
        shift = torch.arange(topology.num_nodes, device=node.device)
    place = torch.empty_like(ranks)
    place[by_load] = ranks - start[node[by_load]]
    position = (place - shift[node]) % size[node]
    chosen = by_load[start + (position[:, None] + shift) % size]
    chosen[ranks, node] = ranks
    return chosen


def cross_node_load(counts: Counts, topology: Topology) -> Tensor:
    """int64 `[P]`: tokens each rank must send to other nodes, one copy a (token, node)."""
    own = counts.tokens_to_node.gather(
        1, topology.tensors(counts.pairs.device).node_of_rank[:, None]
    )
    return counts.tokens_to_node.sum(dim=1) - own[:, 0]


def choose_forwarders(counts: Counts, topology: Topology, *, balance: bool) -> Tensor:
    """The forwarders with the least predicted load: what the busiest link sends or receives.

    What a rank sends does not depend on forwarders, so nothing is gained once receivers are not
    busier than the busiest sender. Else Algorithm 1, which counts senders only, competes with
    `assign_by_received`. Without `balance`, forwarders are taken by position.

    Returns:
        as `assign_forwarders`.
    """
    chosen = assign_forwarders(counts, topology, balance=balance)
    if not balance:
        return chosen
    busiest = int(received_load(counts, topology, chosen).max())
    if busiest <= _NEAR * int(cross_node_load(counts, topology).max()):
        return chosen
    other = assign_by_received(counts, topology)
    return other if int(received_load(counts, topology, other).max()) < busiest else chosen


_NEAR = 1.02
"""Receivers busier than the busiest sender by less than this are not worth another plan."""


def assign_by_received(counts: Counts, topology: Topology) -> Tensor:
    """Forwarders by what they have to receive, node by node.

    The nodes take turns: in turn i every node sends to the i-th node after it, and there its
    heaviest sender meets the rank that has received least so far, the next the next.

    Returns:
        as `assign_forwarders`; a rank may have different forwarders than its node's others.
    """
    facts = topology.tensors(counts.pairs.device)
    node, num_nodes = facts.node_of_rank, topology.num_nodes
    size = torch.bincount(node, minlength=num_nodes)
    start = offsets(size)[:-1]
    ranks = torch.arange(topology.num_ranks, device=node.device)
    load = torch.zeros_like(ranks)
    chosen = ranks[:, None].expand(-1, num_nodes).clone()
    for turn in range(1, num_nodes):
        goal = (node + turn) % num_nodes
        tokens = counts.tokens_to_node[ranks, goal]
        place = torch.empty_like(ranks)
        place[_within_nodes(-tokens, node)] = ranks - start[node[torch.argsort(node, stable=True)]]
        forwarder = _within_nodes(load, node)[start[goal] + place % size[goal]]
        chosen[ranks, goal] = forwarder
        load = load.index_add(0, forwarder, tokens)
    return chosen


def received_load(counts: Counts, topology: Topology, forwarders: Tensor) -> Tensor:
    """int64 `[P]`: tokens each rank receives from other nodes, as their forwarder."""
    ranks = torch.arange(topology.num_ranks, device=forwarders.device)
    far = forwarders != ranks[:, None]
    load = torch.zeros_like(ranks)
    return load.index_add(0, forwarders[far], counts.tokens_to_node[far])


def _within_nodes(key: Tensor, node: Tensor) -> Tensor:
    """The ranks sorted by (node, key, rank)."""
    order = torch.argsort(key, stable=True)
    return order[torch.argsort(node[order], stable=True)]
