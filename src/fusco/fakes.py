"""What the operators return to those who only trace them: tensors of the right shapes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusco.calls import engine_of
from fusco.engines.base import Engine
from fusco.layout.compact import links_len
from fusco.ops import LIBRARY
from fusco.plans import NUM_PLAN_TENSORS, NUM_SLICED_TENSORS, Plan, SlicedPlan


@torch.library.register_fake("fusco::dispatch", lib=LIBRARY)
def _dispatch_fake(
    rows: Sequence[Tensor], topk_idx: Tensor, topk_weights: Tensor | None, shuffle: int, grads: str
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    _keep_order()
    plan = _fake_plan(rows[0].shape[0], topk_idx, engine_of(shuffle))
    got, row_weights = _fake_rows(rows, plan)
    return got, row_weights, plan


@torch.library.register_fake("fusco::dispatch_planned", lib=LIBRARY)
def _planned_fake(
    rows: Sequence[Tensor],
    topk_weights: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
    grads: str,
) -> tuple[list[Tensor], Tensor]:
    _keep_order()
    return _fake_rows(rows, plan)


@torch.library.register_fake("fusco::combine", lib=LIBRARY)
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


@torch.library.register_fake("fusco::dispatch_backward", lib=LIBRARY)
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


@torch.library.register_fake("fusco::combine_backward", lib=LIBRARY)
def _combine_backward_fake(
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    row_weights: Tensor | None,
    plan: Sequence[Tensor],
    shuffle: int,
) -> tuple[list[Tensor], Tensor]:
    return _fake_rows(grads, plan)


def _keep_order() -> None:
    """Have inductor leave operators in the order of their calls: it would change that by sizes,
    which differ from rank to rank. It looks after it has traced them, and offers no other way."""
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:
        config.reorder_for_peak_memory = False


def _fake_rows(rows: Sequence[Tensor], plan: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    num_rows = Plan.from_tensors(plan).num_rows
    got = [each.new_empty(num_rows, *each.shape[1:]) for each in rows]
    return got, plan[1].new_empty(num_rows, dtype=torch.float32)


def _fake_plan(num_tokens: int, topk_idx: Tensor, engine: Engine) -> list[Tensor]:
    # Ids of another shape are an error, which all ranks raise when they run this.
    topology, top_k = engine.world.topology, engine.world.top_k
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
