"""The one-level planner compiled: bit for bit what `fusco.planner` says, in two passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusco.engines.cpu.kernels.compiling import kernel
from fusco.layout.blocks import Ints


@kernel
def count_pairs(topk_idx: Ints, rank_of_expert: Ints, node_of_rank: Ints, num_nodes: int) -> Ints:
    """`planner.count_pairs`: this rank's packed counts, `[E + P + N]`."""
    num_experts, num_ranks = rank_of_expert.size, node_of_rank.size
    packed = np.zeros(num_experts + num_ranks + num_nodes, dtype=np.int64)
    last_to_rank = np.full(num_ranks, -1, dtype=np.int64)
    last_to_node = np.full(num_nodes, -1, dtype=np.int64)
    for token in range(topk_idx.shape[0]):
        for k in range(topk_idx.shape[1]):
            expert = topk_idx[token, k]
            if expert < 0:
                continue
            packed[expert] += 1
            rank = rank_of_expert[expert]
            if last_to_rank[rank] != token:
                last_to_rank[rank] = token
                packed[num_experts + rank] += 1
            node = node_of_rank[rank]
            if last_to_node[node] != token:
                last_to_node[node] = token
                packed[num_experts + num_ranks + node] += 1
    return packed


@kernel
def describe(
    topk_idx: Ints,
    rank_of_expert: Ints,
    node_of_rank: Ints,
    order_of_rank: Ints,
    num_nodes: int,
    next_slot: Ints,
    peer_ptr: Ints,
    pair_ptr: Ints,
    deduplicate: bool,
) -> Any:
    """The fields of the direct `Leg` but `peer_ptr`, in their order.

    Args:
        topk_idx: `[T, K]`.
        rank_of_expert: `[E]`.
        node_of_rank: `[P]`.
        order_of_rank: `[P]`, the position of each rank by (node, rank).
        num_nodes: N.
        next_slot: `[E]`, the slot of this rank's first pair of each expert; used up here.
        peer_ptr: `[P + 1]`, segments to each rank.
        pair_ptr: `[P + 1]`, pairs to each rank.
        deduplicate: whether pairs of one token and rank share a segment.
    """
    num_tokens, top_k = topk_idx.shape
    num_segments, num_pairs = peer_ptr[-1], pair_ptr[-1]
    row = np.empty(num_segments, dtype=np.int64)
    slot_ptr = np.empty(num_segments + 1, dtype=np.int64)
    slot_ptr[num_segments] = num_pairs
    slot = np.empty(num_pairs, dtype=np.int64)
    pair = np.empty(num_pairs, dtype=np.int64)
    target = np.empty(num_pairs, dtype=np.int64)
    sum_segment = np.full((num_tokens, top_k), -1, dtype=np.int64)
    sum_node = np.full((num_tokens, top_k), num_nodes, dtype=np.int64)
    next_segment, next_pair = peer_ptr.copy(), pair_ptr.copy()
    by_rank = np.empty(top_k, dtype=np.int64)
    for token in range(num_tokens):
        count = 0
        for k in range(top_k):
            expert = topk_idx[token, k]
            if expert < 0:
                continue
            order = order_of_rank[rank_of_expert[expert]]
            place = count
            while place > 0 and (
                order_of_rank[rank_of_expert[topk_idx[token, by_rank[place - 1]]]] > order
            ):
                by_rank[place] = by_rank[place - 1]
                place -= 1
            by_rank[place] = k
            count += 1
        last = -1
        for j in range(count):
            expert = topk_idx[token, by_rank[j]]
            rank = rank_of_expert[expert]
            at = next_pair[rank]
            next_pair[rank] += 1
            sum_node[token, j] = node_of_rank[rank]
            if rank != last or not deduplicate:
                segment = next_segment[rank]
                next_segment[rank] += 1
                row[segment] = token
                slot_ptr[segment] = at
                sum_segment[token, j] = segment
                last = rank
            # Pairs of one expert are together here, k ascending, as in its rows.
            slot[at] = next_slot[expert]
            next_slot[expert] += 1
            pair[at] = token * top_k + by_rank[j]
            target[at] = rank
    return row, slot_ptr, slot, pair, target, sum_segment, sum_node


@kernel
def name_rows(slot_ptr: Ints, slot: Ints, num_rows: int) -> Ints:
    """`planner.assemble_rows` of one arrival: the segment that fills each row; -1: padding."""
    rows = np.full(num_rows, -1, dtype=np.int64)
    for segment in range(slot_ptr.size - 1):
        for at in range(slot_ptr[segment], slot_ptr[segment + 1]):
            rows[slot[at]] = segment
    return rows
