"""The online load balancer: who forwards for whom (FUSCO, section 3.4, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusco.planner.sorting import offsets
from fusco.topology import Topology
from fusco.types import Counts


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
