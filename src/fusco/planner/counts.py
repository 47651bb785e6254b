"""What a rank can say of its own routing before it knows anybody else's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusco.topology import Topology


@dataclass(frozen=True, kw_only=True, eq=False)
class SortedPairs:
    """A routing with the pairs of each token in (node, rank, k) order; no expert comes last.

    Attributes:
        expert: int64 `[T, K]`, as routed, in the order of k.
        pair: int64 `[T, K]`, the index of each sorted pair in `expert.flatten()`.
        rank: int64 `[T, K]`, the rank of each sorted pair; P where there is no expert.
        node: int64 `[T, K]`, its node; N where there is no expert.
        is_first_of_rank: bool `[T, K]`, the first pair of its token on its rank.
        is_first_of_node: bool `[T, K]`, the first pair of its token on its node.
    """

    expert: Tensor
    pair: Tensor
    rank: Tensor
    node: Tensor
    is_first_of_rank: Tensor
    is_first_of_node: Tensor


def sort_pairs(topk_idx: Tensor, topology: Topology) -> SortedPairs:
    """Sort each token's pairs by where they go.

    Args:
        topk_idx: int64 `[T, K]`, expert ids, -1 for none.
        topology: ranks, nodes and placement.
    """
    num_tokens, top_k = topk_idx.shape
    facts = topology.tensors(topk_idx.device)
    by_k = torch.arange(top_k, device=topk_idx.device)
    # The last entry of each table answers for id -1.
    key, _ = torch.sort(facts.order_of_expert[topk_idx] * top_k + by_k, dim=1)
    order = torch.div(key, top_k, rounding_mode="floor")
    rank = facts.rank_of_order[order]
    node = facts.node_of_order[order]
    first_pair = torch.arange(num_tokens, device=topk_idx.device)[:, None] * top_k
    return SortedPairs(
        expert=topk_idx,
        pair=first_pair + (key - order * top_k),
        rank=rank,
        node=node,
        is_first_of_rank=_is_first(rank, topology.num_ranks),
        is_first_of_node=_is_first(node, topology.num_nodes),
    )


def _is_first(sorted_values: Tensor, none: int) -> Tensor:
    first = sorted_values != none
    first[:, 1:] &= sorted_values[:, 1:] != sorted_values[:, :-1]
    return first


def count_pairs(pairs: SortedPairs, topology: Topology) -> Tensor:
    """This rank's row of `Counts` in packed form, int64 `[E + P + N]`."""
    experts, ranks, nodes = topology.num_experts, topology.num_ranks, topology.num_nodes
    per_expert = torch.bincount(pairs.expert.flatten() + 1, minlength=experts + 1)[1:]
    to_rank = torch.bincount(pairs.rank[pairs.is_first_of_rank], minlength=ranks)
    to_node = torch.bincount(pairs.node[pairs.is_first_of_node], minlength=nodes)
    return torch.cat((per_expert, to_rank, to_node))
