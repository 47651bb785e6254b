"""Combine on the CPU: a token's rank adds up partial sums, or the rows themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import COMBINE_FIELDS, Returned
from fusco.engines.cpu.kernels.places import combine_need, place_combine
from fusco.engines.cpu.kernels.reduce import send_partials, send_values, sum_tokens
from fusco.engines.cpu.plans import ArrayPlan, ArrivalArrays, LegArrays
from fusco.engines.cpu.session import Agreement, Session
from fusco.engines.cpu.unfused import in_order_of_arrival
from fusco.layout.blocks import Ints
from fusco.layout.segments import bytes_per_row
from fusco.profiling import stage


def combine(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    row_weights: Tensor | None,
    plan: ArrayPlan,
    row_values: Tensor | None,
) -> tuple[Returned, Ints]:
    """See `Engine.combine`; also where each rank's rows begin among those that move, `[P + 1]`.

    Rows that lie in a window are read where they are by whoever sums them. Of others a rank sums
    what belongs to one token itself, and writes the partial into the window of the token's rank.
    """
    rank, leg, window = session.rank, plan.leg, session.window
    row_bytes = np.array([bytes_per_row(each) for each in rows])
    num_values = 0 if row_values is None else leg.slot.size
    found_at = _found_at(session, rows, row_weights)
    with stage("agree"):
        call, block = session.reserve(call, combine_need(row_bytes, leg.row.size, num_values))
        sent = np.array((leg.row.size, num_values, *found_at))
        agreement = session.agree(call, block, sent)
    said = agreement.payload[:, :COMBINE_FIELDS]
    start, at, sources, num_open = _place(session, agreement, row_bytes, said, row_weights)
    is_open, num_ranks = found_at[0] >= 0, said.shape[0]
    found = plan
    if not session.world.ablation.fusion:
        rows, row_weights, found = in_order_of_arrival(rows, row_weights, plan, rank)
    lines = [_Line(each, row_weights, session) for each in rows]
    if not is_open:
        with stage("write"):
            for line, base in zip(lines, at, strict=False):
                line.send(found.incoming, rank, base)
    if row_values is not None:
        _send_values(row_values, plan.incoming, at[-1])
    if row_values is not None or num_open < num_ranks:
        with stage("wait"):
            session.finish(agreement)
    begin = window.address_of(block)
    with stage("sum"):
        sums = tuple(
            line.sum(found.leg, rank, sources, begin + int(start[i, rank]))
            for i, line in enumerate(lines)
        )
        values = None
        if row_values is not None:
            view = window.view(block, int(start[-1, rank]), num_values, np.float32)
            values = row_values.new_zeros(plan.num_tokens * plan.top_k)
            values[torch.from_numpy(leg.pair)] = torch.from_numpy(view)
            values = values.view(plan.num_tokens, plan.top_k)
    window.heap.release(block)
    if num_open:
        with stage("wait"):
            session.leave(agreement)
    moved = found.incoming.peer_ptr
    if is_open:
        moved = found.incoming.slot_ptr[moved]
    return Returned(sums=sums, pair_values=values), moved


def _place(
    session: Session,
    agreement: Agreement,
    row_bytes: Ints,
    said: Ints,
    row_weights: Tensor | None,
) -> tuple[Ints, Ints, Ints, int]:
    """See `place_combine`."""
    windows, sizes = session.addresses, session.sizes
    arguments = row_bytes, said, agreement.base, windows, sizes, row_weights is not None
    *places, ends, fits = place_combine(*arguments)
    if not fits:
        session.map(ends)
        *places, ends, fits = place_combine(*arguments)
    start, at, sources, num_open = places
    return start, at, sources, num_open


def _found_at(
    session: Session, rows: tuple[Tensor, ...], row_weights: Tensor | None
) -> tuple[int, int, int]:
    """Where in this rank's window rows and weights lie, and where both have ended; -1 unless peers
    can read both there."""
    tensors = [rows[0]] if row_weights is None else [rows[0], row_weights]
    is_dense = all(each.is_contiguous() for each in tensors)
    if len(rows) > 1 or not is_dense or not session.world.ablation.fusion:
        return -1, -1, -1
    if not rows[0].numel():
        return 0, 0, 0
    at = [session.window.find(each) for each in tensors]
    if min(at) < 0:
        return -1, -1, -1
    end = max(begin + each.nbytes for begin, each in zip(at, tensors, strict=True))
    return at[0], at[-1], end


class _Line:
    """Rows that are summed."""

    def __init__(self, rows: Tensor, row_weights: Tensor | None, session: Session) -> None:
        self.rows = rows.contiguous()
        self.rows_at = self.rows.data_ptr()
        self.row_bytes = bytes_per_row(rows)
        self.like, wide = ELEMENTS[rows.dtype]
        self.weights = None if row_weights is None else row_weights.contiguous()
        self.weights_at = 0 if self.weights is None else self.weights.data_ptr()
        self.terms = session.terms[wide]

    def send(self, incoming: ArrivalArrays, own: int, base: Ints) -> None:
        """Partials of what arrived from other ranks, to where each rank's block has them."""
        send_partials(
            self.like,
            self.row_bytes,
            self.rows_at,
            self.weights_at,
            incoming.slot_ptr,
            incoming.slot,
            incoming.peer_ptr,
            incoming.peer_start,
            own,
            base,
            self.terms,
        )

    def sum(self, leg: LegArrays, own: int, sources: Ints, partials_at: int) -> Tensor:
        """`[T, ...]`, from partials of other ranks and from rows that can be read where they are.

        Args:
            leg: of the plan.
            own: this rank.
            sources: `[2, P]`, addresses of the rows and weights of each rank; 0: it sends partials.
            partials_at: address of the partials.
        """
        out = self.rows.new_empty(leg.sum_segment.shape[0], *self.rows.shape[1:])
        sources[0, own], sources[1, own] = self.rows_at, self.weights_at
        sum_tokens(
            self.like,
            self.row_bytes,
            sources,
            partials_at,
            leg.slot_ptr,
            leg.slot,
            leg.target,
            leg.sum_segment,
            leg.sum_node,
            out.data_ptr(),
            self.terms,
        )
        return out


ELEMENTS: dict[torch.dtype, tuple[npt.NDArray[Any], type]] = {
    torch.bfloat16: (np.empty(0, np.uint16), np.float32),
    torch.float16: (np.empty(0, np.int16), np.float32),
    torch.float32: (np.empty(0, np.float32), np.float32),
    torch.float64: (np.empty(0, np.float64), np.float64),
}
"""How compiled loops see elements, see kernels/elements.py, and what they sum them in."""


def _send_values(row_values: Tensor, incoming: ArrivalArrays, base: Ints) -> None:
    send_values(
        row_values.contiguous().numpy(),
        incoming.slot_ptr,
        incoming.slot,
        incoming.peer_ptr,
        base + incoming.pair_start * 4,
        np.empty(incoming.slot.size, dtype=np.float32),
    )
