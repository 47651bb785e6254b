"""Dispatch and combine with gradients, where nobody traces: what the operators do, without them.

An operator that is written in Python takes longer to call than a small dispatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusco import calls
from fusco.engines.base import Delivery, Engine
from fusco.plans import Plan
from fusco.profiling import stage


def dispatch(
    rows: tuple[Tensor, ...],
    routing: Tensor | Plan,
    topk_weights: Tensor | None,
    engine: Engine,
    form: str,
) -> Delivery:
    """See `calls.run_dispatch`; with their graph."""
    delivered: list[Delivery] = []
    *got, row_weights = _Dispatch.apply(  # type: ignore[no-untyped-call]
        delivered, routing, engine, form, topk_weights, *rows
    )
    return Delivery(tuple(got), row_weights, delivered[0].plan)


def combine(
    rows: Iterable[Tensor],
    row_weights: Tensor | None,
    anchor: Tensor | None,
    plan: Plan,
    engine: Engine,
    form: str,
) -> tuple[Tensor, ...]:
    """The sums with their graph; for `anchor` see `ops.combine`."""
    sums: tuple[Tensor, ...] = _Combine.apply(  # type: ignore[no-untyped-call]
        plan, engine, form, anchor, row_weights, *rows
    )
    return sums


_NUM_OTHERS = 5
"""Arguments of the functions below that are not rows; the last of them are weights."""


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        delivered: list[Delivery],
        routing: Tensor | Plan,
        engine: Engine,
        form: str,
        topk_weights: Tensor | None,
        *rows: Tensor,
    ) -> tuple[Tensor, ...]:
        path, delivery = engine.fast_path, None
        if path is not None and len(rows) == 1:
            served = path.dispatch_in_graph(form, rows[0], routing, topk_weights)
            if served is not None:
                delivery = Delivery((served.tokens,), served.row_weights, served.plan)
        if delivery is None:
            delivery = calls.run_dispatch(rows, routing, topk_weights, engine, form)
        delivered.append(delivery)
        ctx.plan, ctx.engine = delivery.plan, engine
        *_, ctx.needs_weights = ctx.needs_input_grad[:_NUM_OTHERS]
        ctx.needs = ctx.needs_input_grad[_NUM_OTHERS:]
        return tuple(calls.as_results((*delivery.rows, delivery.row_weights)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted, values = calls.to_gather(
            grads[:-1], grads[-1], ctx.needs, needs_weights=ctx.needs_weights
        )
        with stage("dispatch_backward"):
            got = calls.run_dispatch_backward(tuple(wanted), values, ctx.plan, ctx.engine)
        return (None, None, None, None, got.pair_values, *calls.gathered(got.sums, ctx.needs))


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        engine: Engine,
        form: str,
        anchor: Tensor | None,
        row_weights: Tensor | None,
        *rows: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.engine, ctx.is_weighted = plan, engine, row_weights is not None
        ctx.save_for_backward(*rows, *(() if row_weights is None else (row_weights,)))
        path, sums = engine.fast_path, None
        if path is not None and len(rows) == 1:
            sums = path.combine_in_graph(form, rows[0], row_weights, plan)
        if sums is not None:
            return (sums.detach(),)
        returned = calls.run_combine(rows, row_weights, plan, engine, form)
        return tuple(calls.as_results(returned.sums))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.saved_tensors
        row_weights = None
        if ctx.is_weighted:
            *rows, row_weights = rows
        with stage("combine_backward"):
            grad_rows, grad_weights = calls.run_combine_backward(
                grads, tuple(rows), row_weights, ctx.plan, ctx.engine
            )
        return (None, None, None, None, grad_weights if ctx.is_weighted else None, *grad_rows)
