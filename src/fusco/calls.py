"""Runs operations on an engine, for the operators of `ops.py` and for calls that need none.

What all ranks must agree on is said in words, the form of a call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import ENGINES, VALUE_ROW_BYTES, Delivery, Engine, Returned
from fusco.engines.ids import find_bad_id
from fusco.errors import InputError, closed_error
from fusco.layout.records import Operation
from fusco.layout.segments import describe_format
from fusco.plans import Plan

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Result = TypeVar("_Result")
_Formats = tuple[tuple[torch.dtype, tuple[int, ...]], ...]

NO_GRADIENTS = "no gradients"
WITH_GRADIENTS = "with gradients"
"""Of a combine."""
_REASON = "fusco takes no such arguments; without fullgraph=True the call says why, on all ranks"


def engine_of(shuffle: int) -> Engine:
    """The engine of an open Shuffle.

    Raises:
        ClosedError: it is closed.
    """
    engine = ENGINES.get(shuffle)
    if engine is None:
        raise closed_error()
    return engine


def not_traced(function: _Function) -> _Function:
    """Keep torch.compile out of a function, without importing it for that."""

    untraced: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal untraced
        compiler = sys.modules.get("torch._dynamo")
        if compiler is None:
            return function(*args)
        untraced = untraced or compiler.disable(function, reason=_REASON)
        return untraced(*args)

    return cast(_Function, call)


@not_traced
def check(engine: Engine, operation: Operation, arguments: Callable[[], None]) -> None:
    """Raise on all ranks what a check of the arguments raises on this one."""
    try:
        arguments()
    except InputError as error:
        with engine:
            engine.agree_on_error(Call(operation, error=error))


@not_traced
def run_beside(
    engine: Engine,
    operation: Operation,
    run: Callable[[], _Result],
    inputs: Sequence[Tensor],
) -> tuple[_Result, torch.cuda.Event]:
    """Run an operation on a side stream, where all ranks can."""
    with engine:
        check(engine, operation, engine.check_beside)
        return engine.run_beside(run, inputs)


def run_dispatch(
    rows: tuple[Tensor, ...],
    routing: Tensor | Plan,
    topk_weights: Tensor | None,
    engine: Engine,
    form: str,
) -> Delivery:
    """What the operators `dispatch` and, with a plan, `dispatch_planned` do."""
    rows, topk_weights = _resolved(rows, topk_weights)
    with engine:
        if isinstance(routing, Plan):
            call = Call(Operation.DISPATCH_PLANNED, routing.number, form)
        else:
            call = _new_dispatch(form)
            if not engine.finds_bad_ids:
                # Here and not with the other checks, since it looks at values, which a compiler
                # cannot.
                error = find_bad_id(routing, engine.world.topology.num_experts)
                if error is not None:
                    engine.agree_on_error(call._replace(error=error))
        return engine.dispatch(call, rows, topk_weights, routing)


@functools.lru_cache(maxsize=256)
def _new_dispatch(form: str) -> Call:
    return Call(Operation.DISPATCH, form=form)


def run_combine(
    rows: tuple[Tensor, ...], row_weights: Tensor | None, plan: Plan, engine: Engine, form: str
) -> Returned:
    """What the operator `combine` does."""
    rows, row_weights = _resolved(rows, row_weights)
    call = Call(Operation.COMBINE, plan.number, form)
    with engine:
        return engine.combine(call, rows, row_weights, plan)


def run_dispatch_backward(
    grads: tuple[Tensor, ...], grad_row_weights: Tensor | None, plan: Plan, engine: Engine
) -> Returned:
    """What the operator `dispatch_backward` does."""
    grads, grad_row_weights = _resolved(grads, grad_row_weights)
    form = form_of(grads, grad_row_weights)
    call = Call(Operation.DISPATCH_BACKWARD, plan.number, form)
    with engine:
        return engine.combine(call, grads, None, plan, grad_row_weights)


def run_combine_backward(
    grads: tuple[Tensor, ...],
    rows: tuple[Tensor, ...],
    row_weights: Tensor | None,
    plan: Plan,
    engine: Engine,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the operator `combine_backward` does."""
    grads, row_weights = _resolved(grads, row_weights)
    call = Call(Operation.COMBINE_BACKWARD, plan.number, form_of(grads, None))
    with engine:
        return engine.combine_backward(call, grads, rows, row_weights, plan)


def _resolved(
    rows: tuple[Tensor, ...], weights: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The same with their values in memory, of which torch has some conjugated or negated later."""
    for each in rows:
        if each.is_conj() or each.is_neg():
            rows = tuple([each.resolve_conj().resolve_neg() for each in rows])
            break
    return rows, weights.resolve_neg() if weights is not None and weights.is_neg() else weights


def as_results(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same as no views, which autograd would let nobody write to."""
    return [each.detach() for each in tensors]


def to_gather(
    grads: Sequence[Tensor],
    grad_row_weights: Tensor,
    needs: Sequence[bool],
    *,
    needs_weights: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """What goes back to the tokens: wanted gradients of rows, and those of row weights."""
    wanted = [grad for grad, need in zip(grads, needs, strict=True) if need]
    values = grad_row_weights if needs_weights else None
    if not wanted and values is not None:
        # Values travel beside rows: where only weights want gradients, beside the narrowest.
        wanted = [values.new_zeros((values.shape[0], VALUE_ROW_BYTES // values.itemsize))]
    return wanted, values


def gathered(sums: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of each tensor of rows, None where it is not wanted."""
    rest = iter(sums)
    return [next(rest) if need else None for need in needs]


def wanted_gradients(rows: Sequence[Tensor], weights: Tensor | None) -> str:
    """Which gradients a dispatch of these will be asked for, in words."""
    if not torch.is_grad_enabled():
        return NO_GRADIENTS
    wants = [i for i, each in enumerate(rows) if each.requires_grad]
    names = [f"x[{i}]" if len(rows) > 1 else "x" for i in wants]
    if weights is not None and weights.requires_grad:
        names.append("topk_weights")
    return f"gradients of {' and '.join(names)}" if names else NO_GRADIENTS


def form_of(rows: Sequence[Tensor], weights: Tensor | None, grads: str = "") -> str:
    """What must be equal on all ranks, in words."""
    return _form_of(_formats(rows), weights is not None, grads)


def _formats(rows: Sequence[Tensor]) -> _Formats:
    return tuple([(each.dtype, each.shape[1:]) for each in rows])


@functools.lru_cache(maxsize=256)
def _form_of(formats: _Formats, has_weights: bool, grads: str) -> str:
    parts = [describe_format(dtype, shape) for dtype, shape in formats]
    if has_weights:
        parts.append("with weights")
    return ", ".join([*parts, grads] if grads else parts)


def is_eager(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing but these plain tensors' own kernels would see an operator of them, where no
    compiler traces."""
    if torch._C._are_functorch_transforms_active():
        return False
    for each in tensors:  # noqa: SIM110 - all() of a generator takes twice as long
        if type(each) is not Tensor and each is not None:
            return False
    return True
