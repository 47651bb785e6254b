"""The data that flow through fusco, all frozen: routing, counts, legs, plans and results.

Shape letters: T tokens of this rank, K experts a token (top-k), E experts, L experts of this rank,
P ranks, N nodes, R rows this rank receives (padding counted), H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

Rows = Tensor | tuple[Tensor, ...]
AnyRows = TypeVar("AnyRows", bound=Rows)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Each mechanism of the paper's Table 3 (FUSCO, section 5.4), to be switched off alone.

    Attributes:
        fusion: the layout change happens inside the transfer. Off: rows are permuted into
            device-major order, moved, and permuted again.
        deduplicate: a token crosses to a node, and to a rank, once. Off: once for each of its
            experts, and combine then rounds every weighted row on its own.
        balance: forwarders are chosen by load (Algorithm 1). Off: by position in the node.
    """

    fusion: bool = True
    deduplicate: bool = True
    balance: bool = True


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
class Plan(ABC):
    """Everything that dispatch, combine and their backwards need to know of one routing decision.

    Attributes:
        identity: int64 `[2]` on the CPU: the number of the plan, the same on every rank, and the
            key of the Shuffle it belongs to.
        tokens_per_expert: int64 `[L]`, padding not counted.
        expert_offsets: int32 `[L + 1]`, padding counted.
    """

    identity: Tensor
    tokens_per_expert: Tensor
    expert_offsets: Tensor

    @property
    def number(self) -> int:
        """The number that all ranks know it by."""
        number: int = self.identity.tolist()[0]
        return number

    @property
    def key(self) -> int:
        """The key of the Shuffle it belongs to."""
        key: int = self.identity.tolist()[1]
        return key

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.tokens_per_expert.device

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """T."""

    @property
    @abstractmethod
    def top_k(self) -> int:
        """K."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """R, padding counted."""

    @abstractmethod
    def to_tensors(self) -> list[Tensor]:
        """As a flat list, the form in which a plan passes through operators."""

    @staticmethod
    def from_tensors(flat: Sequence[Tensor]) -> Plan:
        """The inverse of `to_tensors`, of any kind of plan."""
        if len(flat) == NUM_COMPACT_TENSORS:
            return CompactPlan.unflatten(flat)
        if len(flat) == NUM_SLICED_TENSORS:
            return SlicedPlan.unflatten(flat)
        return SegmentPlan.unflatten(flat)


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentPlan(Plan):
    """A plan as dense segment descriptors, on one or two levels.

    Attributes:
        row_segment: int64 `[R]`, the segment that fills each row, counted over `arrival` and then
            the relay's arrival; -1 on padding.
        send: expert-level descriptors of this rank's own tokens, to ranks reached directly.
        arrival: what this rank receives directly.
        forwarding: the node level; None in a one-level plan.
    """

    row_segment: Tensor
    send: Leg
    arrival: Arrival
    forwarding: Forwarding | None

    @property
    def num_tokens(self) -> int:
        return self.send.sum_segment.shape[0]

    @property
    def top_k(self) -> int:
        return self.send.sum_segment.shape[1]

    @property
    def num_rows(self) -> int:
        return self.row_segment.shape[0]

    @property
    def num_arrivals(self) -> int:
        """Rows this rank receives, padding not counted."""
        relayed = 0 if self.forwarding is None else self.forwarding.relay_arrival.slot.shape[0]
        return self.arrival.slot.shape[0] + relayed

    def to_tensors(self) -> list[Tensor]:
        flat = [self.identity, self.tokens_per_expert, self.expert_offsets, self.row_segment]
        parts: list[Leg | Arrival] = [self.send, self.arrival]
        if self.forwarding is not None:
            level = self.forwarding
            parts += [level.send, level.arrival, level.relay, level.relay_arrival]
        for part in parts:
            names = _LEG_FIELDS if isinstance(part, Leg) else _ARRIVAL_FIELDS
            flat += [getattr(part, each) for each in names]
        return flat

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor]) -> SegmentPlan:
        """The inverse of `to_tensors`."""
        rest = iter(flat)
        head = [next(rest) for _ in range(4)]

        def leg() -> Leg:
            return Leg(**{each: next(rest) for each in _LEG_FIELDS})

        def arrival() -> Arrival:
            return Arrival(**{each: next(rest) for each in _ARRIVAL_FIELDS})

        direct = (leg(), arrival())
        forwarding = None
        if len(flat) > NUM_PLAN_TENSORS[1]:
            forwarding = Forwarding(
                send=leg(), arrival=arrival(), relay=leg(), relay_arrival=arrival()
            )
        return cls(
            identity=head[0],
            tokens_per_expert=head[1],
            expert_offsets=head[2],
            row_segment=head[3],
            send=direct[0],
            arrival=direct[1],
            forwarding=forwarding,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompactPlan(Plan):
    """A one-level plan in the few int32 arrays that kernels read, made where the routing lies.

    Attributes:
        pairs: int32 `[2, T, K]`, the rank of each pair and its final slot there; -1 for none.
        links: int32 `[n]`, what else the kernels need, laid out by `layout/compact.py`.
        row_extent: uint8 `[R]` of no memory of its own; only its shape means something.
    """

    pairs: Tensor
    links: Tensor
    row_extent: Tensor

    @property
    def num_tokens(self) -> int:
        return self.pairs.shape[1]

    @property
    def top_k(self) -> int:
        return self.pairs.shape[2]

    @property
    def num_rows(self) -> int:
        return self.row_extent.shape[0]

    def to_tensors(self) -> list[Tensor]:
        head = [self.identity, self.tokens_per_expert, self.expert_offsets]
        return [*head, self.pairs, self.links, self.row_extent]

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor]) -> CompactPlan:
        """The inverse of `to_tensors`."""
        return cls(
            identity=flat[0],
            tokens_per_expert=flat[1],
            expert_offsets=flat[2],
            pairs=flat[3],
            links=flat[4],
            row_extent=flat[5],
        )


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


@dataclass(frozen=True, kw_only=True, eq=False)
class SlicedPlan(Plan):
    """A two-level plan whose rows cross between nodes in slices.

    A rank *holds* its own tokens and, as a forwarder, the rows received from other nodes, in this
    order. A slice of a combine is what belongs to a fixed number of consecutive tokens of one rank.
    Bounds of peers and slices (`peer_ptr`, `peer_start`, `pair_start`, `slice_ptr`) are on the CPU,
    all else is where the rows are.

    Attributes:
        row_is_padding: bool `[R]`.
        near: expert-level descriptors of this rank's own tokens, to the ranks of its node.
        far: node-level forwarding descriptors, to the forwarders of other nodes.
        received: what this rank receives as a forwarder.
        received_slice: int64 `[n]`, the slice of its source that each row received belongs to.
        relay_pair: int64, the pair, as a slot of `received`, that each pair relayed serves.
        partials: what this rank sums for its node.
        held_ptr: int64 `[held + 1]`, of the lists of partials that make up each row held.
        held: int64, places of partials, in rank order within a list.
        final_ptr: int64 `[T + 1]`, of the lists of nodes' sums that make up each token.
        final: int64, rows of the staging memory, in node order within a list.
    """

    row_is_padding: Tensor
    near: Leg
    far: Leg
    received: Arrival
    received_slice: Tensor
    relay_pair: Tensor
    partials: Partials
    held_ptr: Tensor
    held: Tensor
    final_ptr: Tensor
    final: Tensor

    @property
    def num_tokens(self) -> int:
        return self.near.sum_segment.shape[0]

    @property
    def top_k(self) -> int:
        return self.near.sum_segment.shape[1]

    @property
    def num_rows(self) -> int:
        return self.row_is_padding.shape[0]

    def to_tensors(self) -> list[Tensor]:
        flat: list[Tensor] = []
        for name, part, names in _SLICED_FIELDS:
            value = getattr(self, name)
            flat += [value] if part is None else [getattr(value, each) for each in names]
        return flat

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor]) -> SlicedPlan:
        """The inverse of `to_tensors`."""
        rest = iter(flat)
        values: dict[str, Tensor | Leg | Arrival | Partials] = {}
        for name, part, names in _SLICED_FIELDS:
            values[name] = (
                next(rest) if part is None else part(**{each: next(rest) for each in names})
            )
        return cls(**values)  # type: ignore[arg-type]


def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


_SLICED_PARTS: dict[str, type[Leg | Arrival | Partials]] = {
    "near": Leg,
    "far": Leg,
    "received": Arrival,
    "partials": Partials,
}
_SLICED_FIELDS = tuple(
    (name, part, _names(part) if part else ())
    for name in _names(SlicedPlan)
    for part in (_SLICED_PARTS.get(name),)
)
"""Names and, of what is no tensor, types and names of tensors. Compilers know neither `fields` nor
`vars`."""
NUM_COMPACT_TENSORS = len(fields(CompactPlan))
_LEG_FIELDS = _names(Leg)
_ARRIVAL_FIELDS = _names(Arrival)
_HOP = len(_LEG_FIELDS) + len(_ARRIVAL_FIELDS)
NUM_SLICED_TENSORS = sum(len(names) or 1 for _, _, names in _SLICED_FIELDS)
NUM_PLAN_TENSORS = {1: 4 + _HOP, 2: 4 + 3 * _HOP}
"""Length of `SegmentPlan.to_tensors()` for plans of one and of two levels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """Segment descriptors for one peer (FUSCO, section 3.2): parts of a byte buffer, in order.

    Attributes:
        offset: int64 `[n]` on the CPU, where each segment begins, bytes.
        size: int64 `[n]` on the CPU, bytes.
    """

    offset: Tensor
    size: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched(Generic[AnyRows]):
    """What `Shuffle.dispatch` returns.

    Attributes:
        tokens: `[R, H]` expert-major, this rank's experts; a tuple where a tuple was dispatched.
        row_weights: float32 `[R]`, the router weight of each row; 1 where no weights were given,
            0 on padding.
        plan: reusable: `shuffle.dispatch(x2, topk_weights=w2, plan=d.plan)`.
    """

    tokens: AnyRows
    row_weights: Tensor
    plan: Plan

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64 `[L]`, padding not counted. Part of the plan's memory, as are the offsets."""
        return self.plan.tokens_per_expert

    @property
    def expert_offsets(self) -> Tensor:
        """int32 `[L + 1]`, padding counted: local expert e has the rows from `[e]` to `[e + 1]`.
        Grouped products of torch take the ends alone (`offs=d.expert_offsets[1:]`)."""
        return self.plan.expert_offsets


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a Shuffle has done so far, as this rank saw it.

    Attributes:
        num_dispatches: dispatches, backwards of combine counted.
        num_combines: combines, backwards of dispatch counted.
        num_rows: rows received by dispatches, padding not counted.
        bytes_to_peer: row bytes moved to each rank of the group; the own rank's are local.
        load_imbalance: rows of the busiest rank over the mean, in the last plan.
        wait_s: seconds spent waiting for each rank.
        window_bytes: size of this rank's window now.
    """

    num_dispatches: int
    num_combines: int
    num_rows: int
    bytes_to_peer: tuple[int, ...]
    load_imbalance: float
    wait_s: tuple[float, ...]
    window_bytes: int


def as_tuple(rows: Rows) -> tuple[Tensor, ...]:
    """The tensors of a dispatch, one or several."""
    return (rows,) if isinstance(rows, Tensor) else tuple(rows)


def like(rows: AnyRows, tensors: Sequence[Tensor]) -> AnyRows:
    """One tensor where `rows` is one, else a tuple."""
    return cast(AnyRows, tensors[0] if isinstance(rows, Tensor) else tuple(tensors))
