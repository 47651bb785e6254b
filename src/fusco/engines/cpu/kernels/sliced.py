"""The two-level planner compiled: bit for bit what `fusco.planner` and the lists of the two-level
engine say, in one pass each."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusco.engines.cpu.kernels.compiling import inner, kernel
from fusco.engines.cpu.kernels.order import offsets, sort_by_rank
from fusco.layout.blocks import Ints


@kernel
def describe_sends(
    topk_idx: Ints,
    rank_of_expert: Ints,
    node_of_rank: Ints,
    order_of_rank: Ints,
    through: Ints,
    own_node: int,
    num_nodes: int,
    first_slot: Ints,
    near: Ints,
    far: Ints,
    deduplicate: bool,
) -> Any:
    """Both legs that `planner.plan_sends` makes.

    Args:
        topk_idx: `[T, K]`.
        rank_of_expert: `[E]`.
        node_of_rank: `[P]`.
        order_of_rank: `[P]`, the position of each rank by (node, rank).
        through: `[P]`, the rank that receives what this one sends to each of another node.
        own_node: of this rank.
        num_nodes: N.
        first_slot: `[E]`, the slot of this rank's first pair of each expert; used up here.
        near: `[2, P]`, segments and pairs from this rank to each of its node.
        far: `[2, P]`, segments and pairs from this rank to each forwarder.
        deduplicate: whether pairs of one token and rank, or node, share a segment.

    Returns:
        peer_ptr, row, slot_ptr, slot, pair and target of the near leg, those of the far leg,
        sum_segment and sum_node.
    """
    num_tokens, top_k = topk_idx.shape
    near_leg, far_leg = _new_leg(near), _new_leg(far)
    num_near = near_leg[1].size
    near_segment, near_pair = near_leg[0].copy(), offsets(near[1])
    far_segment, far_pair = far_leg[0].copy(), offsets(far[1])
    sum_segment = np.full((num_tokens, top_k), -1, dtype=np.int64)
    sum_node = np.full((num_tokens, top_k), num_nodes, dtype=np.int64)
    by_rank = np.empty(top_k, dtype=np.int64)
    for token in range(num_tokens):
        count = sort_by_rank(topk_idx, token, rank_of_expert, order_of_rank, by_rank)
        last_rank, last_node = -1, -1
        for j in range(count):
            expert = topk_idx[token, by_rank[j]]
            rank = rank_of_expert[expert]
            node = node_of_rank[rank]
            sum_node[token, j] = node
            slot = first_slot[expert]
            first_slot[expert] += 1
            pair = token * top_k + by_rank[j]
            if node == own_node:
                opens = rank != last_rank or not deduplicate
                at = _add(near_leg, near_segment, near_pair, rank, opens, token, slot, pair, rank)
                if opens:
                    sum_segment[token, j] = at
            else:
                opens = node != last_node or not deduplicate
                peer = through[rank]
                at = _add(far_leg, far_segment, far_pair, peer, opens, token, slot, pair, rank)
                if opens:
                    sum_segment[token, j] = num_near + at
            last_rank, last_node = rank, node
    return near_leg, far_leg, sum_segment, sum_node


@kernel
def describe_relay(
    slot_ptr: Ints, slot: Ints, target: Ints, sizes: Ints, node: int, top_k: int
) -> Any:
    """The leg that `planner.plan_relay` makes, in the order of its fields.

    Args:
        slot_ptr: `[n + 1]`, of the rows received.
        slot: `[m]`.
        target: `[m]`, the rank of each slot.
        sizes: `[2, P]`, segments and pairs from this rank to each of its node.
        node: of this rank.
        top_k: K.
    """
    num_rows = slot_ptr.size - 1
    leg = _new_leg(sizes)
    next_segment, next_pair = leg[0].copy(), offsets(sizes[1])
    sum_segment = np.full((num_rows, top_k), -1, dtype=np.int64)
    sum_node = np.full((num_rows, top_k), node, dtype=np.int64)
    for row in range(num_rows):
        for i in range(slot_ptr[row], slot_ptr[row + 1]):
            rank = target[i]
            opens = i == slot_ptr[row] or rank != target[i - 1]
            at = _add(leg, next_segment, next_pair, rank, opens, row, slot[i], i, rank)
            sum_segment[row, i - slot_ptr[row]] = at if opens else -1
    return leg, sum_segment, sum_node


@kernel
def list_held(near: Ints, num_near: int, relay: Ints) -> Any:
    """`held_ptr` and `held`.

    Args:
        near: `[T, K]`, segments that make up each token; those from `num_near` on are not near.
        num_near: segments to the own node.
        relay: `[n, K]`, segments that make up each row received; -1: none.
    """
    num_tokens = near.shape[0]
    ptr = np.zeros(num_tokens + relay.shape[0] + 1, dtype=np.int64)
    held = np.empty(near.size + relay.size, dtype=np.int64)
    count = 0
    for token in range(num_tokens):
        for j in range(near.shape[1]):
            if 0 <= near[token, j] < num_near:
                held[count] = near[token, j]
                count += 1
        ptr[token + 1] = count
    for row in range(relay.shape[0]):
        for j in range(relay.shape[1]):
            if relay[row, j] >= 0:
                held[count] = relay[row, j] + num_near
                count += 1
        ptr[num_tokens + row + 1] = count
    return ptr, held[:count].copy()


@kernel
def list_final(
    segment: Ints,
    num_near: int,
    peer_ptr: Ints,
    row: Ints,
    lanes: Ints,
    tokens: int,
    rows: int,
) -> Any:
    """`final_ptr` and `final`.

    Args:
        segment: `[T, K]`, segments that make up each token; those from `num_near` on are far.
        num_near: segments to the own node.
        peer_ptr: `[P + 1]`, of the far leg.
        row: `[n]`, likewise.
        lanes: the peers of the far leg, in the order of their rows in the staging memory.
        tokens: of a slice.
        rows: of a lane in the staging memory.
    """
    item = np.empty(row.size, dtype=np.int64)
    for lane in range(lanes.size):
        first = peer_ptr[lanes[lane]]
        for i in range(first, peer_ptr[lanes[lane] + 1]):
            if row[i] // tokens != row[first] // tokens:
                first = i
            item[i] = lane * rows + i - first
    num_tokens, top_k = segment.shape
    ptr = np.zeros(num_tokens + 1, dtype=np.int64)
    final = np.empty(segment.size, dtype=np.int64)
    count = 0
    for token in range(num_tokens):
        has_own = False
        for j in range(top_k):
            if segment[token, j] >= num_near:
                final[count] = item[segment[token, j] - num_near]
                count += 1
            elif segment[token, j] >= 0 and not has_own:
                has_own = True
                final[count] = lanes.size * rows + token % tokens
                count += 1
        ptr[token + 1] = count
    return ptr, final[:count].copy()


@kernel
def sort_partials(
    lists: Ints, near_segments: Ints, near_pairs: Ints, relay_segments: Ints, relay_pairs: Ints,
    node: Ints, rank: int,
) -> Any:  # fmt: skip
    """The fields of `Partials`, in their order.

    Args:
        lists: of all ranks of the node; see `SlicedPlanner.read_partials`.
        near_segments: `[P, P]`; the others likewise.
        node: its ranks, ascending.
        rank: this one.
    """
    num_segments = num_pairs = num_slices = 0
    for peer in node:
        for segments, pairs in (near_segments, near_pairs), (relay_segments, relay_pairs):
            num_segments += segments[peer, rank]
            num_pairs += pairs[peer, rank]
    # By segment, in the order of the lists: its slice, where its slots are, and where it belongs.
    facts = np.empty((6, num_segments), dtype=np.int64)
    begin = count = 0
    for peer in node:
        place = pair_place = 0
        for segments, pairs in (near_segments, near_pairs), (relay_segments, relay_pairs):
            n, m = segments[peer, rank], pairs[peer, rank]
            first = place + segments[peer, :rank].sum()
            first_pair = pair_place + pairs[peer, :rank].sum()
            slots = begin + 2 * n
            for i in range(n):
                facts[0, count] = lists[begin + n + i]
                facts[1, count] = lists[begin + i]
                facts[2, count] = slots
                facts[3, count] = peer
                facts[4, count] = first + i
                facts[5, count] = first_pair
                num_slices = max(num_slices, lists[begin + n + i] + 1)
                slots += lists[begin + i]
                first_pair += lists[begin + i]
                count += 1
            begin += 2 * n + m
            place += segments[peer].sum()
            pair_place += pairs[peer].sum()
    slice_ptr = np.zeros(num_slices + 1, dtype=np.int64)
    for i in range(num_segments):
        slice_ptr[facts[0, i] + 1] += 1
    slice_ptr = np.cumsum(slice_ptr)
    following = slice_ptr.copy()
    order = np.empty(num_segments, dtype=np.int64)
    for i in range(num_segments):
        order[following[facts[0, i]]] = i
        following[facts[0, i]] += 1
    target, place_of = np.empty((2, num_segments), dtype=np.int64)
    slot_ptr = np.zeros(num_segments + 1, dtype=np.int64)
    slot, pair_place_of = np.empty((2, num_pairs), dtype=np.int64)
    for i in range(num_segments):
        found = order[i]
        target[i], place_of[i] = facts[3, found], facts[4, found]
        at = slot_ptr[i]
        for j in range(facts[1, found]):
            slot[at + j] = lists[facts[2, found] + j]
            pair_place_of[at + j] = facts[5, found] + j
        slot_ptr[i + 1] = at + facts[1, found]
    return slice_ptr, target, place_of, slot_ptr, slot, pair_place_of


@inner
def _new_leg(sizes: Ints) -> Any:
    """peer_ptr, row, slot_ptr, slot, pair and target of a leg of these segments and pairs."""
    peer_ptr = offsets(sizes[0])
    num_segments, num_pairs = peer_ptr[-1], sizes[1].sum()
    slot_ptr = np.empty(num_segments + 1, dtype=np.int64)
    slot_ptr[num_segments] = num_pairs
    return (
        peer_ptr,
        np.empty(num_segments, dtype=np.int64),
        slot_ptr,
        np.empty(num_pairs, dtype=np.int64),
        np.empty(num_pairs, dtype=np.int64),
        np.empty(num_pairs, dtype=np.int64),
    )


@inner
def _add(
    leg: Any,
    next_segment: Ints,
    next_pair: Ints,
    peer: int,
    opens: bool,
    row: int,
    slot: int,
    pair: int,
    target: int,
) -> Any:
    """Write one pair to a leg, and the segment that it opens, whose number is returned."""
    _, rows, slot_ptr, slots, pairs, targets = leg
    at, segment = next_pair[peer], next_segment[peer]
    next_pair[peer] += 1
    slots[at], pairs[at], targets[at] = slot, pair, target
    if opens:
        rows[segment], slot_ptr[segment] = row, at
        next_segment[peer] += 1
    return segment
