"""Combine on the CPU: partial sums straight into their token's rank, which adds them up."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Returned
from fusco.engines.cpu.kernels.reduce import new_terms, send_partials, send_values, sum_tokens
from fusco.engines.cpu.session import Session
from fusco.engines.cpu.unfused import in_order_of_arrival
from fusco.layout.blocks import Ints, combine_sections
from fusco.layout.segments import bytes_per_row
from fusco.profiling import stage
from fusco.types import Arrival, Leg, SegmentPlan


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
    found = plan
    if not session.world.ablation.fusion:
        rows, row_weights, found = in_order_of_arrival(rows, row_weights, plan, rank)
    lines = [_Line(each, row_weights, plan.top_k) for each in rows]
    with stage("write"):
        for line, base in zip(lines, at, strict=False):
            line.send(found.arrival, rank, base)
        if row_values is not None:
            _send_values(row_values, arrival, at[-1])
    with stage("wait"):
        session.finish(agreement)
    starts = sections.start[:, rank].tolist()
    with stage("sum"):
        sums = []
        for line, start in zip(lines, starts, strict=False):
            sums.append(line.sum(found.send, rank, session.window.address_of(block) + start))
        values = None
        if row_values is not None:
            view = session.window.view(block, starts[-1], leg.slot.shape[0], np.float32)
            values = row_values.new_zeros(plan.num_tokens * plan.top_k)
            values[leg.pair] = torch.from_numpy(view)
            values = values.view(plan.num_tokens, plan.top_k)
    session.window.heap.release(block)
    return Returned(sums=tuple(sums), pair_values=values)


class _Line:
    """Rows that are summed."""

    def __init__(self, rows: Tensor, row_weights: Tensor | None, top_k: int) -> None:
        self.like = rows
        self.rows = rows.contiguous()
        self.row_bytes = bytes_per_row(rows)
        self.elements = self.rows.view(-1).view(_SEEN_AS.get(rows.dtype, rows.dtype)).numpy()
        self.weights_at = 0 if row_weights is None else row_weights.data_ptr()
        wide = np.float64 if rows.dtype == torch.float64 else np.float32
        self.terms = new_terms(top_k, wide)

    def send(self, arrival: Arrival, own: int, base: Ints) -> None:
        """Partials of what arrived from other ranks, to where each rank's block has them."""
        to = base + arrival.peer_start.numpy() * self.row_bytes
        to[own] = 0
        send_partials(
            self.elements,
            self.row_bytes,
            self.weights_at,
            arrival.slot_ptr.numpy(),
            arrival.slot.numpy(),
            arrival.peer_ptr.numpy(),
            to,
            self.terms,
        )

    def sum(self, leg: Leg, own: int, partials_at: int) -> Tensor:
        """`[T, ...]`, from the partials of other ranks and the own rank's rows."""
        out = self.like.new_empty(leg.sum_segment.shape[0], *self.like.shape[1:])
        rows_at = np.zeros((2, leg.peer_ptr.shape[0]), dtype=np.int64)
        rows_at[:, own] = self.rows.data_ptr(), self.weights_at
        sum_tokens(
            self.elements,
            self.row_bytes,
            rows_at[0],
            rows_at[1],
            partials_at,
            leg.slot_ptr.numpy(),
            leg.slot.numpy(),
            leg.target.numpy(),
            leg.sum_segment.numpy(),
            leg.sum_node.numpy(),
            out.data_ptr(),
            self.terms,
        )
        return out


_SEEN_AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""How numba sees elements that it has no type for; see kernels/elements.py."""


def _send_values(row_values: Tensor, arrival: Arrival, base: Ints) -> None:
    send_values(
        row_values.contiguous().numpy(),
        arrival.slot_ptr.numpy(),
        arrival.slot.numpy(),
        arrival.peer_ptr.numpy(),
        base + arrival.pair_start.numpy() * 4,
        np.empty(arrival.slot.shape[0], dtype=np.float32),
    )
