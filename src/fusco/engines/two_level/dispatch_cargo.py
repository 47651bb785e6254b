"""Slices of a dispatch: rows gathered as they leave, and scattered by forwarders as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fusco.engines.node import NodeBlocks
from fusco.engines.two_level.lanes import lanes_of, make_lanes
from fusco.layout.segments import as_segments, as_words
from fusco.legs import Arrival, Leg
from fusco.topology import Topology
from fusco.transports.slices import Cargo


class DispatchCargo(Cargo):
    """Rows on their way to forwarders, and from them to the slots of their node.

    A slice has at most `rows_per_slice` rows of one tensor. Which rows these are follows from the
    counts, so that slices may arrive before it is known where they go.

    Args:
        rows: tensors `[T, ...]`.
        far: node-level forwarding descriptors.
        far_ptr: int64 `[P + 1]`, how many segments arrive from each rank.
        topology: as seen from this rank.
        rows_per_slice: the most rows of a slice.
        blocks: of this node; section i holds the rows of tensor i.
        tell: begins to tell forwarders what they must know of the rows; behind the first slices,
            for the network is idle until these leave.
        meanwhile: what needs no network; returns what arrives here as a forwarder.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        far: Leg,
        far_ptr: Tensor,
        topology: Topology,
        rows_per_slice: int,
        blocks: NodeBlocks,
        tell: Callable[[], None],
        meanwhile: Callable[[], Arrival],
    ) -> None:
        self._parts = [as_segments(each) for each in rows]
        self._widths = [part.shape[1] for part in self._parts]
        self._far = far
        self._rows_per_slice = rows_per_slice
        self._blocks = blocks
        self._tell: Callable[[], None] | None = tell
        self._meanwhile = meanwhile
        leaving = lanes_of(far.peer_ptr, topology, away=1)
        arriving = lanes_of(far_ptr, topology, away=-1)
        self._leaving = [self._cut(far.peer_ptr, peer) for peer in leaving]
        self._arriving = [self._cut(far_ptr, peer) for peer in arriving]
        self.outgoing = make_lanes(leaving, self._leaving, self._widths)
        self.incoming = make_lanes(arriving, self._arriving, self._widths)

    @property
    def num_steps(self) -> int:
        return max((len(lane.sizes) for lane in (*self.outgoing, *self.incoming)), default=0)

    def stride(self, step: int) -> int:
        return self._rows_per_slice * self._widths[step % len(self._parts)]

    def begin(self, step: int) -> None:
        if step > 0:
            self._tell_once()

    def load(self, step: int, lane: int, slot: Tensor) -> None:
        number, part = divmod(step, len(self._parts))
        rows = self._far.row[self._leaving[lane][number]]
        source, out = as_words(self._parts[part], slot.view(-1, self._widths[part]))
        torch.index_select(source, 0, rows, out=out)

    def meanwhile(self) -> None:
        self._tell_once()
        self._received = self._meanwhile()

    def unload(self, step: int, lane: int, slot: Tensor) -> None:
        number, part = divmod(step, len(self._parts))
        chosen = self._arriving[lane][number]
        received = self._received
        self._blocks.scatter(
            part,
            slot.view(-1, self._widths[part]),
            None,
            received.slot_ptr[chosen.start : chosen.stop + 1],
            received.slot,
            received.target,
        )

    def _tell_once(self) -> None:
        if self._tell is not None:
            self._tell()
            self._tell = None

    def _cut(self, peer_ptr: Tensor, peer: int) -> list[slice]:
        begin, end = peer_ptr[peer : peer + 2].tolist()
        bounds = [*range(begin, end, self._rows_per_slice), end]
        return [slice(first, last) for first, last in pairwise(bounds)]
