"""Plans of the CPU engine: what `fusco.planner` makes of one level, compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusco.engines.base import World
from fusco.engines.cpu.kernels import plan as kernels
from fusco.layout.blocks import Ints
from fusco.legs import Arrival, Leg
from fusco.plans import Plan, SegmentPlan


class LegArrays(NamedTuple):
    """A `Leg`."""

    peer_ptr: Ints
    row: Ints
    slot_ptr: Ints
    slot: Ints
    pair: Ints
    target: Ints
    sum_segment: Ints
    sum_node: Ints


class ArrivalArrays(NamedTuple):
    """An `Arrival`."""

    peer_ptr: Ints
    peer_start: Ints
    pair_start: Ints
    slot_ptr: Ints
    slot: Ints
    target: Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayPlan(Plan):
    """A `SegmentPlan` of one level whose parts are arrays. Their tensors, which cost as much as
    planning a small batch, are made when somebody looks at them."""

    row_segment: Ints
    leg: LegArrays
    incoming: ArrivalArrays

    @classmethod
    def of(cls, plan: Plan) -> ArrayPlan:
        """Any plan that this engine made."""
        if isinstance(plan, ArrayPlan):
            return plan
        assert isinstance(plan, SegmentPlan), "plans come from this engine"
        return cls(
            identity=plan.identity,
            tokens_per_expert=plan.tokens_per_expert,
            expert_offsets=plan.expert_offsets,
            row_segment=plan.row_segment.numpy(),
            leg=LegArrays(*_arrays(vars(plan.send).values())),
            incoming=ArrivalArrays(*_arrays(vars(plan.arrival).values())),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.leg.sum_segment)

    @property
    def top_k(self) -> int:
        top_k: int = self.leg.sum_segment.shape[1]
        return top_k

    @property
    def num_rows(self) -> int:
        return len(self.row_segment)

    @functools.cached_property
    def segments(self) -> SegmentPlan:
        """The same as tensors."""
        leg, incoming = map(torch.from_numpy, self.leg), map(torch.from_numpy, self.incoming)
        return SegmentPlan(
            identity=self.identity,
            tokens_per_expert=self.tokens_per_expert,
            expert_offsets=self.expert_offsets,
            row_segment=torch.from_numpy(self.row_segment),
            send=Leg(**dict(zip(LegArrays._fields, leg, strict=True))),
            arrival=Arrival(**dict(zip(ArrivalArrays._fields, incoming, strict=True))),
            forwarding=None,
        )

    def to_tensors(self) -> list[Tensor]:
        return self.segments.to_tensors()


class Outline(NamedTuple):
    """What a rank can plan before the slot lists of others arrive.

    Attributes:
        segments: int64 `[P, P]`, between all ranks: sender, receiver.
        pairs: int64 `[P, P]`, likewise.
        rows: int64 `[P]`, rows each rank receives, padding counted.
        tokens_per_expert: int64 `[L]`.
        expert_offsets: int32 `[L + 1]`.
        leg: what this rank sends.
    """

    segments: Ints
    pairs: Ints
    rows: Ints
    tokens_per_expert: Ints
    expert_offsets: Ints
    leg: LegArrays


class Tables(NamedTuple):
    """The maps of a topology that planning needs, see `TopologyTensors`."""

    rank_of_expert: Ints
    node_of_rank: Ints
    order_of_rank: Ints
    device_major: Ints

    @classmethod
    def of(cls, world: World) -> Tables:
        facts = world.topology.tensors("cpu")
        return cls(*(getattr(facts, name).numpy() for name in cls._fields))


def count(topk_idx: Tensor, tables: Tables, num_nodes: int) -> tuple[Ints, int, int]:
    """This rank's packed counts, int64 `[E + P + N]`, the lowest and the highest expert id."""
    packed, low, high = kernels.count_pairs(
        topk_idx.contiguous().numpy(), tables.rank_of_expert, tables.node_of_rank, num_nodes
    )
    return packed, low, high


def outline(topk_idx: Tensor, counts: Ints, tables: Tables, world: World) -> Outline:
    """What `fusco.planner.plan_sends` says for one level.

    Args:
        topk_idx: int64 `[T, K]`.
        counts: int64 `[P, E + P + N]`, packed, of all ranks.
        tables: of the topology.
        world: of the engine.
    """
    topology = world.topology
    segments, pairs, rows, tokens, offsets, leg = kernels.outline(
        topk_idx.contiguous().numpy(),
        counts,
        *tables,
        topology.num_nodes,
        topology.rank,
        world.alignment,
        world.ablation.deduplicate,
    )
    return Outline(segments, pairs, rows, tokens, offsets, LegArrays(*leg))


def finish(
    identity: Tensor, sends: Outline, slots_per_segment: Ints, slot: Ints, rank: int
) -> ArrayPlan:
    """The plan, once the slot lists of all ranks are there: slots of each segment, and slots."""
    *incoming, row_segment = kernels.read_arrival(
        slots_per_segment, slot, sends.segments, sends.pairs, rank, sends.rows[rank]
    )
    return ArrayPlan(
        identity=identity,
        tokens_per_expert=torch.from_numpy(sends.tokens_per_expert),
        expert_offsets=torch.from_numpy(sends.expert_offsets),
        row_segment=row_segment,
        leg=sends.leg,
        incoming=ArrivalArrays(*incoming),
    )


def _arrays(tensors: Iterable[Tensor]) -> Iterable[Ints]:
    return (each.numpy() for each in tensors)
