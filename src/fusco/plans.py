"""Plans, all frozen: what follows from one routing, also as the flat list that operators take.

Shape letters: T tokens of this rank, K experts a token (top-k), L experts of this rank, R rows this
rank receives (padding counted).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fusco.legs import Arrival, Forwarding, Leg, Partials


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
