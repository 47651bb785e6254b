"""What plans are made of, all frozen: counts, hops as either end sees them, and sums.

Shape letters: P ranks, N nodes, E experts, K experts a token (top-k).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """What every rank tells every other before rows move; one row a source rank.

    Attributes:
        pairs: int64 `[P, E]`, (token, k) pairs routed to each expert.
        tokens_to_rank: int64 `[P, P]`, distinct tokens with an expert on each rank.
        tokens_to_node: int64 `[P, N]`, distinct tokens with an expert on each node.
    """

    pairs: Tensor
    tokens_to_rank: Tensor
    tokens_to_node: Tensor

    @classmethod
    def split(cls, packed: Tensor, num_experts: int, num_ranks: int, num_nodes: int) -> Counts:
        """From the packed form `[P, E + P + N]` in which counts travel; what is behind is left."""
        return cls(
            pairs=packed[:, :num_experts],
            tokens_to_rank=packed[:, num_experts : num_experts + num_ranks],
            tokens_to_node=packed[:, num_experts + num_ranks :][:, :num_nodes],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Leg:
    """One hop, seen by its sender: dense segment descriptors, sorted by peer and then row.

    A segment is one row on its way to one peer, with the list of the slots it must fill there;
    the first of them is its landing slot.

    Attributes:
        peer_ptr: int64 `[P + 1]`, segments of peer p are `peer_ptr[p]:peer_ptr[p + 1]`.
        row: int64 `[n]`, the row each segment is read from.
        slot_ptr: int64 `[n + 1]`, slots of segment i are `slot_ptr[i]:slot_ptr[i + 1]`.
        slot: int64 `[m]`, final slots, k ascending within a segment and rank.
        pair: int64 `[m]`, the (row, k) pair that each slot serves, as an index into the flattened
            pairs of the rows.
        target: int64 `[m]`, the rank that owns each slot: the peer, or where the peer is only a
            forwarder, a rank of its node.
        sum_segment: int64 `[rows, K]`, the segments that combine adds for each row, in
            (node, rank) order; -1 where there is none. On the first hop of a two-level plan,
            numbers from `n` on name segments of the forwarding leg.
        sum_node: int64 `[rows, K]`, the node of each of these.
    """

    peer_ptr: Tensor
    row: Tensor
    slot_ptr: Tensor
    slot: Tensor
    pair: Tensor
    target: Tensor
    sum_segment: Tensor
    sum_node: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """The mirror image of a leg at its receiver: the same segments in the same order.

    Attributes:
        peer_ptr: int64 `[P + 1]`, segments from peer p are `peer_ptr[p]:peer_ptr[p + 1]`.
        peer_start: int64 `[P]`, the number that each peer gives the first of these segments.
        pair_start: int64 `[P]`, likewise for the first slot.
        slot_ptr: int64 `[n + 1]`, slots of segment i are `slot_ptr[i]:slot_ptr[i + 1]`.
        slot: int64 `[m]`, final slots.
        target: int64 `[m]`, the rank that owns each slot.
    """

    peer_ptr: Tensor
    peer_start: Tensor
    pair_start: Tensor
    slot_ptr: Tensor
    slot: Tensor
    target: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Forwarding:
    """The node level of a two-level plan (FUSCO, section 3.3).

    Attributes:
        send: node-level forwarding descriptors: one segment a (token, remote node), to that
            node's forwarder.
        arrival: what this rank receives as a forwarder.
        relay: expert-level distribution descriptors: from the rows received as a forwarder to the
            ranks of this node.
        relay_arrival: what other forwarders of this node relay to this rank.
    """

    send: Leg
    arrival: Arrival
    relay: Leg
    relay_arrival: Arrival


@dataclass(frozen=True, kw_only=True, eq=False)
class Partials:
    """What an expert's rank sums for the ranks of its node, slice by slice: lists of its rows.

    Attributes:
        slice_ptr: int64 `[slices + 1]`, sums of slice i are `slice_ptr[i]:slice_ptr[i + 1]`.
        target: int64 `[n]`, the rank that gets each.
        place: int64 `[n]`, its place among the partials that this rank gets.
        slot_ptr: int64 `[n + 1]`, rows of sum i are `slot[slot_ptr[i]:slot_ptr[i + 1]]`.
        slot: int64 `[m]`, k ascending within a sum.
        pair_place: int64 `[m]`, the place of each row among the pairs that the rank gets.
    """

    slice_ptr: Tensor
    target: Tensor
    place: Tensor
    slot_ptr: Tensor
    slot: Tensor
    pair_place: Tensor
