"""dispatch, combine and their backwards as torch.library operators.

A Shuffle is named by its key, a plan by its tensors, so that torch.compile and checkpointing see
nothing but tensors and integers. `grads` says in words which gradients will be wanted, the one
thing that an operator cannot see and all ranks must agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from fusco import calls
from fusco.checks import Limits
from fusco.engines.base import Engine
from fusco.layout.records import Operation
from fusco.plans import Plan

# torch.library.custom_op would do, but its first call imports the compiler, two seconds of work.
LIBRARY = torch.library.Library("fusco", "DEF")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _operator(schema: str) -> Callable[[_Function], _Function]:
    """Make a function the operator `fusco::<schema>`; what is returned calls the operator."""
    name = schema.partition("(")[0]

    def register(function: _Function) -> _Function:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, calls.not_traced(function), "CompositeExplicitAutograd")
        operator = getattr(torch.ops.fusco, name)
        # Others wait for this rank, also where it has no use for what it gets.
        has_side_effect(operator.default)
        return cast(_Function, operator)

    return register


def _checked(shuffle: int, operation: Operation, arguments: Callable[[Limits], None]) -> Engine:
    """The engine of an open Shuffle that can do this with these arguments."""
    engine = calls.engine_of(shuffle)
    limits = Limits.of(engine)
    calls.check(engine, operation, lambda: arguments(limits))
    return engine


@_operator(
    "dispatch(Tensor[] rows, Tensor topk_idx, Tensor? topk_weights, int shuffle, str grads)"
    " -> (Tensor[], Tensor, Tensor[])"
)
def dispatch(
    rows: Sequence[Tensor], topk_idx: Tensor, topk_weights: Tensor | None, shuffle: int, grads: str
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Make a plan and run it: rows `[T, ...]` to `[R, ...]`, row weights `[R]`, the plan."""
    engine = _checked(
        shuffle,
        Operation.DISPATCH,
        lambda limits: limits.check_dispatch(tuple(rows), topk_idx, topk_weights, None),
    )
    form = calls.form_of(rows, topk_weights, grads)
    got = calls.run_dispatch(tuple(rows), topk_idx, topk_weights, engine, form)
    *got_rows, row_weights = calls.as_results((*got.rows, got.row_weights))
    return got_rows, row_weights, _apart(got.plan.to_tensors())


def _apart(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same, each with memory of its own, as tracers expect of an operator's results."""
    seen: set[int] = set()
    apart = []
    for each in tensors:
        address = each.untyped_storage().data_ptr()
        apart.append(each.clone() if address in seen else each)
        seen.add(address)
    return apart


@_operator(
    "dispatch_planned(Tensor[] rows, Tensor? topk_weights, Tensor[] plan, int shuffle, str grads)"
    " -> (Tensor[], Tensor)"
)
def dispatch_planned(
    rows: Sequence[Tensor],
    topk_weights: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
    grads: str,
) -> tuple[list[Tensor], Tensor]:
    """Run a plan again: rows `[T, ...]` to `[R, ...]`, row weights `[R]`."""
    whole = Plan.from_tensors(plan)
    engine = _checked(
        shuffle,
        Operation.DISPATCH_PLANNED,
        lambda limits: limits.check_dispatch(tuple(rows), None, topk_weights, whole),
    )
    form = calls.form_of(rows, topk_weights, grads)
    got = calls.run_dispatch(tuple(rows), whole, topk_weights, engine, form)
    *got_rows, row_weights = calls.as_results((*got.rows, got.row_weights))
    return got_rows, row_weights


@_operator(
    "combine(Tensor[] rows, Tensor? row_weights, Tensor? anchor, Tensor[] plan, int shuffle,"
    " str grads) -> Tensor[]"
)
def combine(
    rows: Sequence[Tensor],
    row_weights: Tensor | None,
    anchor: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
    grads: str,
) -> list[Tensor]:
    """Sum rows `[R, ...]` to `[T, ...]`. `anchor` only ties the result to the dispatch, so that a
    rank whose experts had no rows, and hence no graph, takes part in the backward too."""
    whole = Plan.from_tensors(plan)
    engine = _checked(
        shuffle,
        Operation.COMBINE,
        lambda limits: limits.check_sums(tuple(rows), row_weights, whole),
    )
    form = calls.form_of(rows, row_weights, grads)
    return calls.as_results(calls.run_combine(tuple(rows), row_weights, whole, engine, form).sums)


@_operator(
    "dispatch_backward(Tensor[] grads, Tensor? grad_row_weights, Tensor[] plan, int shuffle)"
    " -> (Tensor[], Tensor)"
)
def dispatch_backward(
    grads: Sequence[Tensor],
    grad_row_weights: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
) -> tuple[list[Tensor], Tensor]:
    """Gradients `[R, ...]` summed to `[T, ...]`; those of row weights back to `[T, K]`."""
    whole = Plan.from_tensors(plan)
    got = calls.run_dispatch_backward(
        tuple(grads), grad_row_weights, whole, calls.engine_of(shuffle)
    )
    values = got.pair_values
    return list(got.sums), plan[0].new_empty(0, dtype=torch.float32) if values is None else values


@_operator(
    "combine_backward(Tensor[] grads, Tensor[] rows, Tensor? row_weights, Tensor[] plan,"
    " int shuffle) -> (Tensor[], Tensor)"
)
def combine_backward(
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    row_weights: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
) -> tuple[list[Tensor], Tensor]:
    """Gradients `[T, ...]` to those of the rows `[R, ...]` and of the row weights `[R]`."""
    whole = Plan.from_tensors(plan)
    engine = calls.engine_of(shuffle)
    got = calls.run_combine_backward(tuple(grads), tuple(rows), row_weights, whole, engine)
    return list(got[0]), got[1]


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    rows, _, topk_weights, ctx.shuffle, _ = inputs
    _remember_dispatch(ctx, rows, topk_weights, output[2])


def _planned_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    rows, topk_weights, plan, ctx.shuffle, _ = inputs
    _remember_dispatch(ctx, rows, topk_weights, plan)


def _remember_dispatch(
    ctx: Any, rows: Sequence[Tensor], topk_weights: Tensor | None, plan: Sequence[Tensor]
) -> None:
    ctx.needs = [each.requires_grad for each in rows]
    ctx.needs_weights = topk_weights is not None and topk_weights.requires_grad
    ctx.save_for_backward(*plan)


def _gather_gradients(
    ctx: Any, grads: Sequence[Tensor], grad_row_weights: Tensor
) -> tuple[list[Tensor | None], Tensor | None]:
    wanted, values = calls.to_gather(
        grads, grad_row_weights, ctx.needs, needs_weights=ctx.needs_weights
    )
    sums, grad_weights = dispatch_backward(wanted, values, list(ctx.saved_tensors), ctx.shuffle)
    return calls.gathered(sums, ctx.needs), grad_weights if ctx.needs_weights else None


def _dispatch_grad(ctx: Any, grads: Sequence[Tensor], grad_row_weights: Tensor, _: Any) -> Any:
    grad_rows, grad_weights = _gather_gradients(ctx, grads, grad_row_weights)
    return grad_rows, None, grad_weights, None, None


def _planned_grad(ctx: Any, grads: Sequence[Tensor], grad_row_weights: Tensor) -> Any:
    grad_rows, grad_weights = _gather_gradients(ctx, grads, grad_row_weights)
    return grad_rows, grad_weights, [None] * len(ctx.saved_tensors), None, None


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, row_weights, _, plan, ctx.shuffle, _ = inputs
    ctx.num_rows = len(rows)
    ctx.is_weighted = row_weights is not None
    ctx.save_for_backward(*plan, *rows, *(() if row_weights is None else (row_weights,)))


def _combine_grad(ctx: Any, grads: Sequence[Tensor]) -> Any:
    saved = list(ctx.saved_tensors)
    row_weights = saved.pop() if ctx.is_weighted else None
    plan, rows = saved[: -ctx.num_rows], saved[-ctx.num_rows :]
    grad_rows, grad_weights = combine_backward(grads, rows, row_weights, plan, ctx.shuffle)
    weights_grad = None if row_weights is None else grad_weights
    return grad_rows, weights_grad, None, [None] * len(plan), None, None


torch.library.register_autograd(
    "fusco::dispatch", _dispatch_grad, setup_context=_dispatch_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "fusco::dispatch_planned", _planned_grad, setup_context=_planned_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "fusco::combine", _combine_grad, setup_context=_combine_setup, lib=LIBRARY
)
