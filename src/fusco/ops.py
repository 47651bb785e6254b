"""dispatch, combine and their backwards as torch.library operators.

A Shuffle is named by its key, a plan by its tensors, so that torch.compile and checkpointing see
nothing but tensors and integers. `grads` says in words which gradients will be wanted, the one
thing that an operator cannot see and all ranks must agree on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from fusco.checks import Limits
from fusco.engines.agreement import Call
from fusco.engines.base import ENGINES, VALUE_ROW_BYTES, Delivery, Engine, Returned
from fusco.engines.ids import find_bad_id
from fusco.errors import InputError, closed_error
from fusco.layout.records import Operation
from fusco.layout.segments import describe_format
from fusco.plans import Plan

# torch.library.custom_op would do, but its first call imports the compiler, two seconds of work.
LIBRARY = torch.library.Library("fusco", "DEF")
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


def _operator(schema: str) -> Callable[[_Function], _Function]:
    """Make a function the operator `fusco::<schema>`; what is returned calls the operator."""
    name = schema.partition("(")[0]

    def register(function: _Function) -> _Function:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _not_traced(function), "CompositeExplicitAutograd")
        operator = getattr(torch.ops.fusco, name)
        # Others wait for this rank, also where it has no use for what it gets.
        has_side_effect(operator.default)
        return cast(_Function, operator)

    return register


def _not_traced(function: _Function) -> _Function:
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


@_not_traced
def check(engine: Engine, operation: Operation, arguments: Callable[[], None]) -> None:
    """Raise on all ranks what a check of the arguments raises on this one."""
    try:
        arguments()
    except InputError as error:
        with engine:
            engine.agree_on_error(Call(operation, error=error))


@_not_traced
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


def _checked(shuffle: int, operation: Operation, arguments: Callable[[Limits], None]) -> Engine:
    """The engine of an open Shuffle that can do this with these arguments."""
    engine = engine_of(shuffle)
    limits = Limits.of(engine)
    check(engine, operation, lambda: arguments(limits))
    return engine


def wanted_gradients(rows: Sequence[Tensor], weights: Tensor | None) -> str:
    """Which gradients a dispatch of these will be asked for, in words."""
    if not torch.is_grad_enabled():
        return NO_GRADIENTS
    names = [str(i) for i, each in enumerate(rows) if each.requires_grad]
    if weights is not None and weights.requires_grad:
        names.append("weights")
    return f"gradients of {' '.join(names)}" if names else NO_GRADIENTS


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
    """Whether nothing but these plain tensors' own kernels would see an operator of them."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for each in tensors:  # noqa: SIM110 - all() of a generator takes twice as long
        if type(each) is not Tensor and each is not None:
            return False
    return True


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
    form = form_of(rows, topk_weights, grads)
    got = run_dispatch(tuple(rows), topk_idx, topk_weights, engine, form)
    *got_rows, row_weights = as_results((*got.rows, got.row_weights))
    return got_rows, row_weights, _apart(got.plan.to_tensors())


def as_results(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same as no views, which autograd would let nobody write to."""
    return [each.detach() for each in tensors]


def _apart(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same, each with memory of its own, as tracers expect of an operator's results."""
    seen: set[int] = set()
    apart = []
    for each in tensors:
        address = each.untyped_storage().data_ptr()
        apart.append(each.clone() if address in seen else each)
        seen.add(address)
    return apart


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


def _resolved(
    rows: tuple[Tensor, ...], weights: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The same with their values in memory, of which torch has some conjugated or negated later."""
    for each in rows:
        if each.is_conj() or each.is_neg():
            rows = tuple([each.resolve_conj().resolve_neg() for each in rows])
            break
    return rows, weights.resolve_neg() if weights is not None and weights.is_neg() else weights


@functools.lru_cache(maxsize=256)
def _new_dispatch(form: str) -> Call:
    return Call(Operation.DISPATCH, form=form)


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
    form = form_of(rows, topk_weights, grads)
    got = run_dispatch(tuple(rows), whole, topk_weights, engine, form)
    *got_rows, row_weights = as_results((*got.rows, got.row_weights))
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
    form = form_of(rows, row_weights, grads)
    return as_results(run_combine(tuple(rows), row_weights, whole, engine, form).sums)


def run_combine(
    rows: tuple[Tensor, ...], row_weights: Tensor | None, plan: Plan, engine: Engine, form: str
) -> Returned:
    """What the operator `combine` does."""
    rows, row_weights = _resolved(rows, row_weights)
    call = Call(Operation.COMBINE, plan.number, form)
    with engine:
        return engine.combine(call, rows, row_weights, plan)


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
    got = run_dispatch_backward(tuple(grads), grad_row_weights, whole, engine_of(shuffle))
    values = got.pair_values
    return list(got.sums), plan[0].new_empty(0, dtype=torch.float32) if values is None else values


def run_dispatch_backward(
    grads: tuple[Tensor, ...], grad_row_weights: Tensor | None, plan: Plan, engine: Engine
) -> Returned:
    """What the operator `dispatch_backward` does."""
    grads, grad_row_weights = _resolved(grads, grad_row_weights)
    form = form_of(grads, grad_row_weights)
    call = Call(Operation.DISPATCH_BACKWARD, plan.number, form)
    with engine:
        return engine.combine(call, grads, None, plan, grad_row_weights)


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
    engine = engine_of(shuffle)
    got = run_combine_backward(tuple(grads), tuple(rows), row_weights, whole, engine)
    return list(got[0]), got[1]


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
    wanted, values = to_gather(grads, grad_row_weights, ctx.needs, needs_weights=ctx.needs_weights)
    sums, grad_weights = dispatch_backward(wanted, values, list(ctx.saved_tensors), ctx.shuffle)
    return gathered(sums, ctx.needs), grad_weights if ctx.needs_weights else None


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
