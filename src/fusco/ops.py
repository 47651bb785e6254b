"""dispatch, combine and their backwards as torch.library operators.

A Shuffle is named by its key, a plan by its tensors, so that torch.compile and checkpointing see
nothing but tensors and integers. `grads` says in words which gradients will be wanted, the one
thing that an operator cannot see and all ranks must agree on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery, Engine, Returned
from fusco.engines.ids import find_bad_id
from fusco.errors import ClosedError, PeerError
from fusco.layout.compact import links_len
from fusco.layout.records import Operation
from fusco.layout.segments import describe_format
from fusco.types import NUM_PLAN_TENSORS, NUM_SLICED_TENSORS, Plan, SlicedPlan

# torch.library.custom_op would do, but its first call imports the compiler, two seconds of work.
_LIBRARY = torch.library.Library("fusco", "DEF")
_Function = TypeVar("_Function", bound=Callable[..., Any])

NO_GRADIENTS = "no gradients"

ENGINES: dict[int, Engine] = {}
"""The engines of all open Shuffles, by key."""


class using:
    """The engine of an open Shuffle; a lost rank closes it for good.

    Raises:
        ClosedError: it is closed.
    """

    def __init__(self, shuffle: int) -> None:
        self._shuffle = shuffle
        self._engine = engine_of(shuffle)

    def __enter__(self) -> Engine:
        return self._engine

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PeerError):
            del ENGINES[self._shuffle]
            self._engine.close(lost=error.rank)


def engine_of(shuffle: int) -> Engine:
    """The engine of an open Shuffle.

    Raises:
        ClosedError: it is closed.
    """
    if shuffle not in ENGINES:
        raise ClosedError("this Shuffle was closed, or a rank was lost; make a new one")
    return ENGINES[shuffle]


def _operator(schema: str) -> Callable[[_Function], _Function]:
    """Make a function the operator `fusco::<schema>`; what is returned calls the operator."""
    name = schema.partition("(")[0]

    def register(function: _Function) -> _Function:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _not_traced(function), "CompositeExplicitAutograd")
        return cast(_Function, getattr(torch.ops.fusco, name))

    return register


def _not_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of an operator's body, without importing it for that."""

    untraced: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal untraced
        compiler = sys.modules.get("torch._dynamo")
        if compiler is None:
            return function(*args)
        untraced = untraced or compiler.disable(function)
        return untraced(*args)

    return call


def wanted_gradients(rows: Sequence[Tensor], weights: Tensor | None) -> str:
    """Which gradients a dispatch of these will be asked for, in words."""
    if not torch.is_grad_enabled():
        return NO_GRADIENTS
    names = [str(i) for i, each in enumerate(rows) if each.requires_grad]
    if weights is not None and weights.requires_grad:
        names.append("weights")
    return f"gradients of {' '.join(names)}" if names else NO_GRADIENTS


def _form(rows: Sequence[Tensor], weights: Tensor | None, grads: str = "") -> str:
    """What must be equal on all ranks, in words."""
    formats = tuple((each.dtype, each.shape[1:]) for each in rows)
    return _form_of(formats, weights is not None, grads)


@functools.lru_cache(maxsize=256)
def _form_of(
    formats: tuple[tuple[torch.dtype, tuple[int, ...]], ...], has_weights: bool, grads: str
) -> str:
    parts = [describe_format(dtype, shape) for dtype, shape in formats]
    if has_weights:
        parts.append("with weights")
    return ", ".join([*parts, grads] if grads else parts)


def is_eager(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing but these plain tensors' own kernels would see an operator of them."""
    return not torch.compiler.is_compiling() and all(
        type(each) is Tensor for each in tensors if each is not None
    )


@_operator(
    "dispatch(Tensor[] rows, Tensor topk_idx, Tensor? topk_weights, int shuffle, str grads)"
    " -> (Tensor[], Tensor, Tensor[])"
)
def dispatch(
    rows: Sequence[Tensor], topk_idx: Tensor, topk_weights: Tensor | None, shuffle: int, grads: str
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Make a plan and run it: rows `[T, ...]` to `[R, ...]`, row weights `[R]`, the plan."""
    got = run_dispatch(tuple(rows), topk_idx, topk_weights, shuffle, grads)
    return list(got.rows), got.row_weights, got.plan.to_tensors()


def run_dispatch(
    rows: tuple[Tensor, ...],
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    shuffle: int,
    grads: str,
) -> Delivery:
    """What the operator `dispatch` does."""
    with using(shuffle) as engine:
        # Here and not with the other checks, since it looks at values, which a compiler cannot.
        num_experts = engine.world.topology.num_experts
        call = _new_dispatch(_form(rows, topk_weights, grads))
        error = None if engine.finds_bad_ids else find_bad_id(topk_idx, num_experts)
        if error is not None:
            engine.agree_on_error(replace(call, error=error))
        return engine.dispatch(call, rows, topk_weights, topk_idx)


@functools.lru_cache(maxsize=256)
def _new_dispatch(form: str) -> Call:
    return Call(operation=Operation.DISPATCH, form=form)


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
    got = run_planned(tuple(rows), topk_weights, Plan.from_tensors(plan), shuffle, grads)
    return list(got.rows), got.row_weights


def run_planned(
    rows: tuple[Tensor, ...], topk_weights: Tensor | None, plan: Plan, shuffle: int, grads: str
) -> Delivery:
    """What the operator `dispatch_planned` does."""
    form = _form(rows, topk_weights, grads)
    call = Call(operation=Operation.DISPATCH_PLANNED, plan=plan.number, form=form)
    with using(shuffle) as engine:
        return engine.dispatch(call, rows, topk_weights, plan)


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
    return list(run_combine(tuple(rows), row_weights, Plan.from_tensors(plan), shuffle, grads).sums)


def run_combine(
    rows: tuple[Tensor, ...], row_weights: Tensor | None, plan: Plan, shuffle: int, grads: str
) -> Returned:
    """What the operator `combine` does."""
    form = _form(rows, row_weights, grads)
    call = Call(operation=Operation.COMBINE, plan=plan.number, form=form)
    with using(shuffle) as engine:
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
    form = _form(grads, grad_row_weights)
    call = Call(operation=Operation.DISPATCH_BACKWARD, plan=whole.number, form=form)
    with using(shuffle) as engine:
        got = engine.combine(call, tuple(grads), None, whole, grad_row_weights)
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
    call = Call(operation=Operation.COMBINE_BACKWARD, plan=whole.number, form=_form(grads, None))
    with using(shuffle) as engine:
        got = engine.combine_backward(call, tuple(grads), tuple(rows), row_weights, whole)
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
    wanted = [grad.contiguous() for grad, need in zip(grads, ctx.needs, strict=True) if need]
    values = grad_row_weights.contiguous() if ctx.needs_weights else None
    if not wanted and values is not None:
        # Values travel beside rows: where only weights want gradients, beside the narrowest.
        wanted = [values.new_zeros((values.shape[0], 4))]
    sums, grad_weights = dispatch_backward(wanted, values, list(ctx.saved_tensors), ctx.shuffle)
    rest = iter(sums)
    grad_rows = [next(rest) if need else None for need in ctx.needs]
    return grad_rows, grad_weights if ctx.needs_weights else None


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
    dense = [grad.contiguous() for grad in grads]
    grad_rows, grad_weights = combine_backward(dense, rows, row_weights, plan, ctx.shuffle)
    weights_grad = None if row_weights is None else grad_weights
    return grad_rows, weights_grad, None, [None] * len(plan), None, None


torch.library.register_autograd(
    "fusco::dispatch", _dispatch_grad, setup_context=_dispatch_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "fusco::dispatch_planned", _planned_grad, setup_context=_planned_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "fusco::combine", _combine_grad, setup_context=_combine_setup, lib=_LIBRARY
)


@torch.library.register_fake("fusco::dispatch", lib=_LIBRARY)
def _dispatch_fake(
    rows: Sequence[Tensor], topk_idx: Tensor, topk_weights: Tensor | None, shuffle: int, grads: str
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    plan = _fake_plan(topk_idx, engine_of(shuffle))
    got, row_weights = _fake_rows(rows, plan)
    return got, row_weights, plan


@torch.library.register_fake("fusco::dispatch_planned", lib=_LIBRARY)
def _planned_fake(
    rows: Sequence[Tensor],
    topk_weights: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
    grads: str,
) -> tuple[list[Tensor], Tensor]:
    return _fake_rows(rows, plan)


@torch.library.register_fake("fusco::combine", lib=_LIBRARY)
def _combine_fake(
    rows: Sequence[Tensor],
    row_weights: Tensor | None,
    anchor: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
    grads: str,
) -> list[Tensor]:
    num_tokens = Plan.from_tensors(plan).num_tokens
    return [each.new_empty(num_tokens, *each.shape[1:]) for each in rows]


@torch.library.register_fake("fusco::dispatch_backward", lib=_LIBRARY)
def _dispatch_backward_fake(
    grads: Sequence[Tensor],
    grad_row_weights: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
) -> tuple[list[Tensor], Tensor]:
    whole = Plan.from_tensors(plan)
    sums = [each.new_empty(whole.num_tokens, *each.shape[1:]) for each in grads]
    if grad_row_weights is None:
        return sums, plan[0].new_empty(0, dtype=torch.float32)
    return sums, grad_row_weights.new_empty(whole.num_tokens, whole.top_k)


@torch.library.register_fake("fusco::combine_backward", lib=_LIBRARY)
def _combine_backward_fake(
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    row_weights: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
) -> tuple[list[Tensor], Tensor]:
    return _fake_rows(grads, plan)


def _fake_rows(rows: Sequence[Tensor], plan: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    num_rows = Plan.from_tensors(plan).num_rows
    got = [each.new_empty(num_rows, *each.shape[1:]) for each in rows]
    return got, plan[1].new_empty(num_rows, dtype=torch.float32)


def _fake_plan(topk_idx: Tensor, engine: Engine) -> list[Tensor]:
    topology = engine.world.topology
    num_tokens, top_k = topk_idx.shape
    num_ranks = topology.num_ranks
    ctx = torch.library.get_ctx()

    def int64(*shape: int | torch.SymInt) -> Tensor:
        return topk_idx.new_empty(shape, dtype=torch.int64)

    is_sliced = engine.plan_type is SlicedPlan

    def bounds(size: int | torch.SymInt) -> Tensor:
        # Of plans in slices these are on the CPU.
        return torch.empty(size, dtype=torch.int64) if is_sliced else int64(size)

    def leg(num_rows: int | torch.SymInt) -> list[Tensor]:
        segments, slots = ctx.new_dynamic_size(), ctx.new_dynamic_size()
        sums = [int64(num_rows, top_k), int64(num_rows, top_k)]
        head = [bounds(num_ranks + 1), int64(segments), int64(segments + 1)]
        return [*head, int64(slots), int64(slots), int64(slots), *sums]

    def arrival() -> list[Tensor]:
        slots = ctx.new_dynamic_size()
        head = [bounds(num_ranks + 1), bounds(num_ranks), bounds(num_ranks)]
        return [*head, int64(ctx.new_dynamic_size(min=1)), int64(slots), int64(slots)]

    num_local = topology.num_local_experts[topology.rank]
    if engine.has_compact_plans:
        world = engine.world
        size = links_len(num_tokens, num_ranks, world.max_tokens, top_k)
        num_rows = world.max_recv_tokens or ctx.new_dynamic_size()
        return [
            torch.empty(2, dtype=torch.int64),
            int64(num_local),
            topk_idx.new_empty(num_local + 1, dtype=torch.int32),
            topk_idx.new_empty((2, num_tokens, top_k), dtype=torch.int32),
            topk_idx.new_empty(size, dtype=torch.int32),
            topk_idx.new_empty(num_rows, dtype=torch.uint8),
        ]
    plan = [
        torch.empty(2, dtype=torch.int64),
        int64(num_local),
        topk_idx.new_empty(num_local + 1, dtype=torch.int32),
    ]
    if is_sliced:
        lists, some = ctx.new_dynamic_size(min=1), ctx.new_dynamic_size
        plan += [
            topk_idx.new_empty(some(), dtype=torch.bool),
            *leg(num_tokens),
            *leg(num_tokens),
            *arrival(),
            *(int64(some()) for _ in range(2)),
            bounds(some()),
            *(int64(some()) for _ in range(5)),
            int64(lists),
            int64(some()),
            int64(num_tokens + 1),
            int64(some()),
        ]
        assert len(plan) == NUM_SLICED_TENSORS
        return plan
    plan += [int64(ctx.new_dynamic_size()), *leg(num_tokens), *arrival()]
    if engine.plans_two_levels:
        received = arrival()
        plan += [*leg(num_tokens), *received, *leg(received[3].shape[0] - 1), *arrival()]
    assert len(plan) == NUM_PLAN_TENSORS[2 if engine.plans_two_levels else 1]
    return plan
