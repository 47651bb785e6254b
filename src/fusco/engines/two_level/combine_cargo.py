"""Slices of a combine: the sums of nodes, taken as they leave, and added up as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusco.engines.node import Node, NodeBlocks
from fusco.engines.two_level.lanes import SliceSize, lanes_of, make_lanes
from fusco.layout.segments import bytes_per_row, from_segments
from fusco.plans import SlicedPlan
from fusco.topology import Topology
from fusco.transports.slices import Cargo


class CombineCargo(Cargo):
    """The sums of nodes on their way back to the tokens' ranks.

    In step i a rank sums its rows of everybody's slice i for the ranks of its node; then, as a
    forwarder, what these have summed, into the slices that leave; then, as the tokens' rank, the
    sums of all nodes. Tensors of a tuple take steps in turn; but for the ranks of its node a rank
    sums them all in the first, for these are told of slices: they have no numbers for more.

    Args:
        rows: floating tensors `[R, ...]`.
        row_weights: float32 `[R]`; None: a plain sum.
        plan: of the dispatch.
        topology: as seen from this rank.
        size: of slices.
        node: of this rank.
        blocks: of this node; section i holds the partials of tensor i.
        meanwhile: what needs no network, if anything.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        row_weights: Tensor | None,
        plan: SlicedPlan,
        topology: Topology,
        size: SliceSize,
        node: Node,
        blocks: NodeBlocks,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        self._rows = rows
        self._row_weights = row_weights
        self._plan = plan
        self._size = size
        self._node = node
        self._blocks = blocks
        self._meanwhile = meanwhile
        # Values alone may return; then all slices are empty.
        self._widths = [bytes_per_row(each) for each in rows] or [0]
        self.sums = [each.new_empty(plan.num_tokens, *each.shape[1:]) for each in rows]
        sources = lanes_of(plan.received.peer_ptr, topology, away=-1)
        forwarders = lanes_of(plan.far.peer_ptr, topology, away=1)
        far_slice = plan.far.row // size.tokens
        self._leaving = [
            _cut(plan.received_slice, plan.received.peer_ptr, peer) for peer in sources
        ]
        arriving = [_cut(far_slice, plan.far.peer_ptr, peer) for peer in forwarders]
        self.outgoing = make_lanes(sources, self._leaving, self._widths)
        self.incoming = make_lanes(forwarders, arriving, self._widths)

    @property
    def num_steps(self) -> int:
        own = -(-self._plan.num_tokens // self._size.tokens)
        slices = max(own, self._plan.partials.slice_ptr.shape[0] - 1)
        lanes = (len(lane.sizes) for lane in self.outgoing)
        # At least one, in which a rank without rows tells its node that it has begun.
        return max(slices * len(self._widths), *lanes, 1)

    def stride(self, step: int) -> int:
        return self._size.rows * self._widths[step % len(self._widths)]

    def begin(self, step: int) -> None:
        number, part = divmod(step, len(self._widths))
        if part > 0:
            return
        partials = self._plan.partials
        if number + 1 < partials.slice_ptr.shape[0]:
            begin, end = partials.slice_ptr[number : number + 2].tolist()
            for section, rows in enumerate(self._rows):
                self._blocks.push_sums(
                    section,
                    rows,
                    self._row_weights,
                    partials.slot_ptr[begin : end + 1],
                    partials.slot,
                    partials.target[begin:end],
                    partials.place[begin:end],
                )
        self._blocks.reach(number)

    def load(self, step: int, lane: int, slot: Tensor) -> None:
        number, part = divmod(step, len(self._widths))
        self._blocks.wait(number)
        first = self._plan.num_tokens
        chosen = self._leaving[lane][number]
        self._sum_held(part, first + chosen.start, first + chosen.stop, slot)

    def meanwhile(self) -> None:
        if self._meanwhile is not None:
            self._meanwhile()

    def end(self, step: int, slots: Tensor) -> None:
        number, part = divmod(step, len(self._widths))
        begin = number * self._size.tokens
        end = min(begin + self._size.tokens, self._plan.num_tokens)
        if begin >= end or not self._rows:
            return
        self._blocks.wait(number)
        width, own = self._widths[part], len(self.incoming) * self.stride(step)
        self._sum_held(part, begin, end, slots[own : own + (end - begin) * width])
        used = slots[: own + self.stride(step)].view(-1, width)
        self._node.sum_rows(
            from_segments(used, self._rows[part]),
            None,
            self._plan.final_ptr[begin : end + 1],
            self._plan.final,
            self.sums[part][begin:end],
        )

    def _sum_held(self, part: int, begin: int, end: int, slot: Tensor) -> None:
        """Sum the partials of rows held, from `begin` to `end`, into a slot."""
        like = self._rows[part]
        self._node.sum_rows(
            self._blocks.view(part, like),
            None,
            self._plan.held_ptr[begin : end + 1],
            self._plan.held,
            from_segments(slot.view(-1, self._widths[part]), like),
        )


def _cut(in_slice: Tensor, peer_ptr: Tensor, peer: int) -> list[slice]:
    """Segments of a peer by slice; those of a peer are sorted by slice."""
    begin, end = peer_ptr[peer : peer + 2].tolist()
    ends = begin + torch.bincount(in_slice[begin:end]).cumsum(0)
    return [
        slice(first, last)
        for first, last in zip([begin, *ends.tolist()], ends.tolist(), strict=False)
    ]
