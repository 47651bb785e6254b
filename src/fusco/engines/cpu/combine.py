"""Combine on the CPU: a token's rank adds up partial sums, or the rows themselves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import COMBINE_FIELDS, Returned
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
) -> tuple[Returned, Ints]:
    """See `Engine.combine`; also where each rank's rows begin among those that move, `[P + 1]`.

    Rows that lie in a window are read where they are by whoever sums them. Of others a rank sums
    what belongs to one token itself, and writes the partial into the window of the token's rank.
    """
    rank, leg, window = session.rank, plan.send, session.window
    row_bytes = [bytes_per_row(each) for each in rows]
    num_values = leg.slot.shape[0] if row_values is not None else 0
    sent = np.array([[leg.row.shape[0], num_values, *_found_at(session, rows, row_weights)]])
    need = combine_sections(sent[:, 0], row_bytes, sent[:, 1])
    with stage("agree"):
        call, block = session.reserve(call, int(need.total[0]))
        agreement = session.agree(call, block, sent[0])
    said = agreement.payload[:, :COMBINE_FIELDS]
    num_segments, num_values_of, rows_at, weights_at, open_end = said.T
    sections = combine_sections(num_segments, row_bytes, num_values_of)
    is_open = rows_at >= 0
    windows = session.addresses(np.maximum(agreement.base + sections.total, open_end))
    at = sections.start + windows + agreement.base
    found = plan
    if not session.world.ablation.fusion:
        rows, row_weights, found = in_order_of_arrival(rows, row_weights, plan, rank)
    lines = [_Line(each, row_weights, plan.top_k) for each in rows]
    if not is_open[rank]:
        with stage("write"):
            for line, base in zip(lines, at, strict=False):
                line.send(found.arrival, rank, base)
    if row_values is not None:
        _send_values(row_values, plan.arrival, at[-1])
    if row_values is not None or not is_open.all():
        with stage("wait"):
            session.finish(agreement)
    sources = np.where(is_open, (windows + rows_at, windows + weights_at), 0)
    sources[1] *= row_weights is not None
    starts = sections.start[:, rank].tolist()
    with stage("sum"):
        sums = [
            line.sum(found.send, rank, sources, window.address_of(block) + start)
            for line, start in zip(lines, starts, strict=False)
        ]
        values = None
        if row_values is not None:
            view = window.view(block, starts[-1], leg.slot.shape[0], np.float32)
            values = row_values.new_zeros(plan.num_tokens * plan.top_k)
            values[leg.pair] = torch.from_numpy(view)
            values = values.view(plan.num_tokens, plan.top_k)
    window.heap.release(block)
    if is_open.any():
        with stage("wait"):
            session.leave(agreement)
    moved = found.arrival.peer_ptr.numpy()
    if is_open[rank]:
        moved = found.arrival.slot_ptr.numpy()[moved]
    return Returned(sums=tuple(sums), pair_values=values), moved


def _found_at(
    session: Session, rows: tuple[Tensor, ...], row_weights: Tensor | None
) -> tuple[int, int, int]:
    """Where in this rank's window rows and weights lie, and where both have ended; -1 unless peers
    can read both there."""
    if len(rows) > 1 or not rows[0].is_contiguous() or not session.world.ablation.fusion:
        return -1, -1, -1
    if not rows[0].numel():
        return 0, 0, 0
    tensors = [rows[0]] if row_weights is None else [rows[0], row_weights]
    at = [session.window.find(each) for each in tensors]
    if min(at) < 0:
        return -1, -1, -1
    end = max(begin + each.nbytes for begin, each in zip(at, tensors, strict=True))
    return at[0], at[-1], end


class _Line:
    """Rows that are summed."""

    def __init__(self, rows: Tensor, row_weights: Tensor | None, top_k: int) -> None:
        self.like = rows
        self.rows = rows.contiguous()
        self.row_bytes = bytes_per_row(rows)
        self.elements = self.rows.view(-1).view(SEEN_AS.get(rows.dtype, rows.dtype)).numpy()
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

    def sum(self, leg: Leg, own: int, sources: Ints, partials_at: int) -> Tensor:
        """`[T, ...]`, from partials of other ranks and from rows that can be read where they are.

        Args:
            leg: of the plan.
            own: this rank.
            sources: `[2, P]`, addresses of the rows and weights of each rank; 0: it sends partials.
            partials_at: address of the partials.
        """
        out = self.like.new_empty(leg.sum_segment.shape[0], *self.like.shape[1:])
        rows_at, weights_at = sources
        rows_at[own], weights_at[own] = self.rows.data_ptr(), self.weights_at
        sum_tokens(
            self.elements,
            self.row_bytes,
            rows_at,
            weights_at,
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


SEEN_AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
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
