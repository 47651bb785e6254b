"""Combine on the CPU: partial sums straight into their token's rank, which adds them up."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Returned
from fusco.engines.cpu.kernels.reduce import scratch, send_partials, send_values, sum_tokens
from fusco.engines.cpu.session import Session
from fusco.engines.cpu.unfused import in_order_of_arrival
from fusco.layout.blocks import Ints, combine_sections
from fusco.layout.segments import bytes_per_row
from fusco.profiling import stage
from fusco.types import Arrival, Leg, SegmentPlan

_NOBODY = -1


def combine(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    row_weights: Tensor | None,
    plan: SegmentPlan,
    row_values: Tensor | None,
) -> Returned:
    """See `Engine.combine`."""
    rank, leg, arrival = session.rank, plan.send, plan.arrival
    row_bytes = [bytes_per_row(each) for each in rows]
    sent = np.array([[leg.row.shape[0], leg.slot.shape[0] if row_values is not None else 0]])
    need = combine_sections(sent[:, 0], row_bytes, sent[:, 1])
    with stage("agree"):
        call, block = session.reserve(call, int(need.total[0]))
        agreement = session.agree(call, block, sent[0])
    sizes = agreement.payload
    sections = combine_sections(sizes[:, 0], row_bytes, sizes[:, 1])
    at = sections.start + session.addresses(agreement, agreement.base + sections.total)
    if not session.world.ablation.fusion:
        rows, row_weights, arrival = in_order_of_arrival(rows, row_weights, arrival)
    lines = [_Line(each, row_weights) for each in rows]
    # Without deduplication a token has several partials of its own rank too, all by the window.
    own = rank if session.world.ablation.deduplicate else _NOBODY
    with stage("write"):
        for line, base in zip(lines, at, strict=False):
            line.send(arrival, own, base)
        if row_values is not None:
            _send_values(row_values, plan.arrival, at[-1])
    with stage("wait"):
        session.finish(agreement)
    starts = sections.start[:, rank].tolist()
    with stage("sum"):
        sums = []
        for line, start in zip(lines, starts, strict=False):
            count = leg.row.shape[0] * line.width
            partials = session.window.view(block, start, count, line.elements.dtype)
            sums.append(line.sum(leg, arrival, own, partials))
        values = None
        if row_values is not None:
            view = session.window.view(block, starts[-1], leg.slot.shape[0], np.float32)
            values = row_values.new_zeros(plan.num_tokens * plan.top_k)
            values[leg.pair] = torch.from_numpy(view)
            values = values.view(plan.num_tokens, plan.top_k)
    session.window.heap.release(block)
    return Returned(sums=tuple(sums), pair_values=values)


class _Line:
    """Rows that are summed, and the scratch lines of their sums."""

    def __init__(self, rows: Tensor, row_weights: Tensor | None) -> None:
        self.like = rows
        self.width = rows.shape[1:].numel()
        dense = rows.contiguous()
        self.seen_as = _seen_as(dense)
        self.elements: npt.NDArray[Any] = dense.view(-1).view(self.seen_as).numpy()
        self.width = self.width * dense.itemsize // self.elements.itemsize
        wide = np.float64 if rows.dtype == torch.float64 else np.float32
        self.weights = np.empty(0, dtype=wide)
        if row_weights is not None:
            self.weights = row_weights.numpy().astype(wide, copy=False)
        self.sums, self.total = (scratch(np.dtype(wide), 2) for _ in range(2))
        self.lines = [scratch(self.elements.dtype) for _ in range(3)]

    def send(self, arrival: Arrival, own: int, base: Ints) -> None:
        """Partials of what arrived from other ranks, to where each rank's block has them."""
        row_bytes = self.width * self.elements.itemsize
        send_partials(
            self.elements,
            self.width,
            self.weights,
            arrival.slot_ptr.numpy(),
            arrival.slot.numpy(),
            arrival.peer_ptr.numpy(),
            own,
            base + arrival.peer_start.numpy() * row_bytes,
            self.sums,
            self.lines[0],
        )

    def sum(self, leg: Leg, arrival: Arrival, own: int, partials: npt.NDArray[Any]) -> Tensor:
        """`[T, ...]`, from the partials of other ranks and the own rank's rows."""
        out = self.like.new_empty(leg.sum_segment.shape[0], *self.like.shape[1:])
        begin, end = (0, 0) if own == _NOBODY else arrival.peer_ptr[own : own + 2].tolist()
        sum_tokens(
            self.elements,
            self.width,
            self.weights,
            arrival.slot_ptr.numpy(),
            arrival.slot.numpy(),
            int(leg.peer_ptr[own]),
            begin,
            end - begin,
            partials,
            leg.sum_segment.numpy(),
            leg.sum_node.numpy(),
            self.sums,
            self.total,
            *self.lines,
            out.view(-1).view(self.seen_as).numpy(),
        )
        return out


def _seen_as(rows: Tensor) -> torch.dtype:
    """How numba sees the elements of contiguous rows; see kernels/elements.py."""
    if rows.dtype == torch.float16:
        return torch.int16
    if rows.dtype != torch.bfloat16:
        return rows.dtype
    are_words = rows.shape[1:].numel() % 2 == 0 and rows.data_ptr() % 4 == 0
    return torch.uint32 if are_words else torch.uint16


def _send_values(row_values: Tensor, arrival: Arrival, base: Ints) -> None:
    send_values(
        row_values.contiguous().numpy(),
        arrival.slot_ptr.numpy(),
        arrival.slot.numpy(),
        arrival.peer_ptr.numpy(),
        base + arrival.pair_start.numpy() * 4,
        np.empty(arrival.slot.shape[0], dtype=np.float32),
    )
