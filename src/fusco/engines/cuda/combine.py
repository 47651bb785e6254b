"""Combine on GPUs: one kernel a tensor, of which the first agrees for all."""

from __future__ import annotations

from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Returned
from fusco.engines.cuda.jit import Variant
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.session import Session
from fusco.layout.segments import bytes_per_row
from fusco.types import CompactPlan

_THREADS = 256
_BLOCKS_PER_SM = 2


def combine(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    row_weights: Tensor | None,
    plan: CompactPlan,
    row_values: Tensor | None,
) -> Returned:
    """See `Engine.combine`; returns before the kernels have run."""
    session.describe(call, session.heap.nothing)
    num_tokens, top_k = plan.num_tokens, plan.top_k
    pair_values = None
    if row_values is not None:
        row_values = row_values.contiguous()
        pair_values = row_values.new_empty((num_tokens, top_k))
    weights = None if row_weights is None else row_weights.contiguous()
    sums = []
    returns_at = session.constants.returns_at
    for part, each in enumerate(rows):
        dense = each.contiguous()
        row_bytes = bytes_per_row(each)
        out = each.new_empty((num_tokens, *each.shape[1:]))
        arguments = structs.CombineArgs(
            rows=dense.data_ptr(),
            out=out.data_ptr(),
            row_weights=_address(weights),
            row_values=_address(row_values if part == 0 else None),
            pair_values=_address(pair_values if part == 0 else None),
            pairs=plan.pairs.data_ptr(),
            links=plan.links.data_ptr(),
            returns_at=returns_at,
            row_bytes=row_bytes,
            num_tokens=num_tokens,
            part=part,
            is_last=part == len(rows) - 1,
        )
        element = str(each.dtype).removeprefix("torch.")
        session.launcher(Variant(name="combine", element=element))(
            session.stream,
            _BLOCKS_PER_SM * session.num_sms,
            _THREADS,
            0,
            session.constants,
            session.call,
            arguments,
        )
        returns_at += session.layout.num_returns * row_bytes
        sums.append(out)
    return Returned(sums=tuple(sums), pair_values=pair_values)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
