"""The one-level planner compiled: bit for bit what `fusco.planner` says, in a few passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusco.engines.cpu.kernels.compiling import inner, kernel
from fusco.engines.cpu.kernels.order import offsets, sort_by_rank
from fusco.layout.blocks import Ints

_LARGE = 2**62


@kernel
def count_pairs(topk_idx: Ints, rank_of_expert: Ints, node_of_rank: Ints, num_nodes: int) -> Any:
    """`planner.count_pairs`: this rank's packed counts, `[E + P + N]`; the lowest and the highest
    expert id, since ids out of range cannot be counted."""
    num_experts, num_ranks = rank_of_expert.size, node_of_rank.size
    packed = np.zeros(num_experts + num_ranks + num_nodes, dtype=np.int64)
    last_to_rank = np.full(num_ranks, -1, dtype=np.int64)
    last_to_node = np.full(num_nodes, -1, dtype=np.int64)
    low, high = _LARGE, -1
    for token in range(topk_idx.shape[0]):
        for k in range(topk_idx.shape[1]):
            expert = topk_idx[token, k]
            low, high = min(low, expert), max(high, expert)
            if expert < 0 or expert >= num_experts:
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
    return packed, low, high


@kernel
def outline(
    topk_idx: Ints,
    counts: Ints,
    rank_of_expert: Ints,
    node_of_rank: Ints,
    order_of_rank: Ints,
    device_major: Ints,
    num_nodes: int,
    rank: int,
    alignment: int,
    deduplicate: bool,
) -> Any:
    """What `measure_traffic` returns, but the slots, and what `describe` returns."""
    segments, pairs, rows, first_slot, tokens, offsets = measure_traffic(
        counts, rank_of_expert, device_major, rank, alignment, deduplicate
    )
    leg = describe(
        topk_idx,
        rank_of_expert,
        node_of_rank,
        order_of_rank,
        num_nodes,
        first_slot,
        segments[rank],
        pairs[rank],
        deduplicate,
    )
    return segments, pairs, rows, tokens, offsets, leg


@inner
def measure_traffic(
    counts: Ints,
    rank_of_expert: Ints,
    device_major: Ints,
    rank: int,
    alignment: int,
    deduplicate: bool,
) -> Any:
    """`planner.measure_traffic` and `planner.expert_layout`.

    Args:
        counts: `[P, E + P + N]`, packed, of all ranks.
        rank_of_expert: `[E]`.
        device_major: `[E]`, the experts sorted by (rank, id).
        rank: this rank.
        alignment: every expert's rows are padded to a multiple of it.
        deduplicate: whether pairs of one token and rank share a segment.

    Returns:
        segments and pairs between all ranks, `[P, P]` each; rows of each rank, `[P]`; the slot of
        this rank's first pair of each expert, `[E]`; this rank's tokens of each expert, `[L]`, and
        their offsets, int32 `[L + 1]`.
    """
    num_ranks, num_experts = counts.shape[0], rank_of_expert.size
    pairs = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for source in range(num_ranks):
        for expert in range(num_experts):
            pairs[source, rank_of_expert[expert]] += counts[source, expert]
    segments = pairs
    if deduplicate:
        segments = counts[:, num_experts : num_experts + num_ranks].copy()
    rows = np.zeros(num_ranks, dtype=np.int64)
    first_slot = np.empty(num_experts, dtype=np.int64)
    tokens = np.empty(num_experts, dtype=np.int64)
    offsets = np.zeros(num_experts + 1, dtype=np.int32)
    num_local = 0
    for expert in device_major:
        owner, total = rank_of_expert[expert], 0
        first_slot[expert] = rows[owner]
        for source in range(num_ranks):
            if source < rank:
                first_slot[expert] += counts[source, expert]
            total += counts[source, expert]
        rows[owner] += (total + alignment - 1) // alignment * alignment
        if owner == rank:
            tokens[num_local] = total
            num_local += 1
            offsets[num_local] = rows[owner]
    return segments, pairs, rows, first_slot, tokens[:num_local], offsets[: num_local + 1]


@inner
def describe(
    topk_idx: Ints,
    rank_of_expert: Ints,
    node_of_rank: Ints,
    order_of_rank: Ints,
    num_nodes: int,
    first_slot: Ints,
    segments: Ints,
    pairs: Ints,
    deduplicate: bool,
) -> Any:
    """The fields of the direct `Leg` that `planner.plan_sends` makes, in their order.

    Args:
        topk_idx: `[T, K]`.
        rank_of_expert: `[E]`.
        node_of_rank: `[P]`.
        order_of_rank: `[P]`, the position of each rank by (node, rank).
        num_nodes: N.
        first_slot: `[E]`, the slot of this rank's first pair of each expert; used up here.
        segments: `[P]`, from this rank to each.
        pairs: `[P]`, likewise.
        deduplicate: whether pairs of one token and rank share a segment.
    """
    num_tokens, top_k = topk_idx.shape
    peer_ptr, pair_ptr = offsets(segments), offsets(pairs)
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
        count = sort_by_rank(topk_idx, token, rank_of_expert, order_of_rank, by_rank)
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
            slot[at] = first_slot[expert]
            first_slot[expert] += 1
            pair[at] = token * top_k + by_rank[j]
            target[at] = rank
    return peer_ptr, row, slot_ptr, slot, pair, target, sum_segment, sum_node


@kernel
def read_arrival(
    slots_per_segment: Ints, slot: Ints, segments: Ints, pairs: Ints, rank: int, num_rows: int
) -> Any:
    """The fields of the `Arrival` that `planner.legs.mirror` makes, in their order, and what
    `planner.assemble_rows` says of it.

    Args:
        slots_per_segment: `[n]`, shipped by the senders, in order of sender.
        slot: `[m]`, likewise.
        segments: `[P, P]`, between all ranks.
        pairs: `[P, P]`, likewise.
        rank: this rank.
        num_rows: R.
    """
    num_ranks = segments.shape[0]
    peer_start, pair_start = np.zeros((2, num_ranks), dtype=np.int64)
    for peer in range(num_ranks):
        for before in range(rank):
            peer_start[peer] += segments[peer, before]
            pair_start[peer] += pairs[peer, before]
    row_segment = np.full(num_rows, -1, dtype=np.int64)
    slot_ptr = offsets(slots_per_segment)
    for segment in range(slots_per_segment.size):
        for i in range(slot_ptr[segment], slot_ptr[segment + 1]):
            row_segment[slot[i]] = segment
    target = np.full(slot.size, rank, dtype=np.int64)
    peer_ptr = offsets(segments[:, rank])
    return peer_ptr, peer_start, pair_start, slot_ptr, slot.copy(), target, row_segment
