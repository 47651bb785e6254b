"""Calls that differ from the common one: other formats out than in, plain sums, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fusco
from fusco.testing import dense
from fusco.testing.cases import (
    Case,
    Inputs,
    device_of,
    draw,
    expect_dispatched,
    expect_round_trip,
    expect_same,
)
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(
    num_tokens=(9, 0, 21), hidden_size=24, top_k=3, num_experts=6, ranks_per_node=2, routing="holes"
)
Variant = Callable[[fusco.Shuffle, Inputs, int], None]


def dispatched(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> fusco.Dispatched:
    return shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))


def sums(inputs: Inputs, outputs: list[Tensor], rank: int, *, weighted: bool = True) -> Tensor:
    host = inputs.host or inputs
    weights = host.weights_of(rank) if weighted else None
    nodes, outputs = inputs.case.node_of_rank, [each.cpu() for each in outputs]
    return dense.combine(inputs.layout, outputs, rank, weights, node_of_rank=nodes)


def plain_sum(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """`weighted=False` ignores the weights of the dispatch."""
    d = dispatched(shuffle, inputs, rank)
    y = shuffle.combine(inputs.outputs[rank], d, weighted=False)
    expect_same(y, sums(inputs, list(inputs.outputs), rank, weighted=False), "combine")


def other_dtype_out(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """What is combined may have another dtype, and another width, than what was dispatched."""
    d = dispatched(shuffle, inputs, rank)
    for dtype, width in ((torch.bfloat16, 24), (torch.float64, 12), (torch.float16, 8)):
        outputs = [each[:, :width].to(dtype) for each in inputs.outputs]
        y = shuffle.combine(outputs[rank], d)
        expect_same(y, sums(inputs, outputs, rank), f"combine in {dtype}")


def tuple_out(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """A tuple is summed part by part, each in its own dtype."""
    d = dispatched(shuffle, inputs, rank)
    parts = [(each[:, :8], each[:, 8:12].double()) for each in inputs.outputs]
    y = shuffle.combine(parts[rank], d)
    want = tuple(sums(inputs, [part[i] for part in parts], rank) for i in range(2))
    expect_same(y, want, "combine")


def other_rows_by_plan(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """A plan is of the routing alone: rows of any format use it, with weights or without."""
    plan = dispatched(shuffle, inputs, rank).plan
    other = draw(replace(inputs.case, payload="bytes", hidden_size=48, weighted=False))
    other = other.routed_as(inputs)
    d = shuffle.dispatch(other.x[rank], plan=plan)
    expect_dispatched(d, other, rank)
    expect_round_trip(shuffle, inputs, rank, plan)


def without_gradients(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """Inference works, and rows of inference may be used after it."""
    with torch.inference_mode():
        d = dispatched(shuffle, inputs, rank)
        y = shuffle.combine(inputs.outputs[rank], d)
    expect_dispatched(d, inputs, rank)
    expect_same(y, inputs.sums(rank), "combine")
    with torch.no_grad():
        expect_round_trip(shuffle, inputs, rank)


def late_combines(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """Many dispatches may be under way, and be combined in any order, or never."""
    rounds = [draw(inputs.case, round_) for round_ in range(5)]
    held = [dispatched(shuffle, each, rank) for each in rounds]
    results = {i: shuffle.combine(rounds[i].outputs[rank], held[i]) for i in (3, 0, 4, 3)}
    for i, y in results.items():
        expect_dispatched(held[i], rounds[i], rank)
        expect_same(y, rounds[i].sums(rank), f"combine {i}")


def strided(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """No argument needs to be contiguous, and ids may be int32."""

    def across(tensors: Iterable[Any]) -> tuple[Tensor, ...]:
        return tuple(each.t().contiguous().t() for each in tensors)

    assert inputs.topk_weights is not None
    odd = replace(
        inputs,
        x=across(inputs.x),
        topk_idx=across(idx.to(torch.int32) for idx in inputs.topk_idx),
        topk_weights=across(inputs.topk_weights),
        outputs=across(inputs.outputs),
    )
    expect_round_trip(shuffle, odd, rank)
    d = shuffle.dispatch(odd.x[rank], odd.topk_idx[rank], odd.topk_weights[rank])
    # Where combine could read them in place, too.
    outputs = shuffle.empty_like(inputs.outputs[rank]).copy_(inputs.outputs[rank])
    weights = shuffle.empty_like(d.row_weights.new_empty((len(d.row_weights), 2)))
    weights.fill_(-7)[:, 0] = d.row_weights
    for rows in (inputs.outputs[rank], outputs):
        y = shuffle.combine(rows, replace(d, row_weights=weights[:, 0]))
        expect_same(y, inputs.sums(rank), "combine")


def other_default_dtype(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """What a program, or one rank of it, makes tensors of by default is nothing to us."""

    def layer() -> tuple[fusco.Dispatched, Tensor, tuple[Tensor, ...]]:
        wanting = inputs.x[rank], inputs.weights_of(rank)
        x, weights = (each.detach().clone().requires_grad_() for each in wanting)  # type: ignore[union-attr]
        d = shuffle.dispatch(x, inputs.topk_idx[rank], weights)
        assert isinstance(d.tokens, Tensor)
        y = shuffle.combine(d.tokens, d)
        gradients = torch.autograd.grad(y.square().sum(), (x, weights))
        return d, shuffle.combine(inputs.outputs[rank], d), gradients

    _, _, want = layer()
    before = torch.get_default_dtype()
    for number, dtype in enumerate((torch.bfloat16, torch.float64)):
        torch.set_default_dtype(dtype if rank != number else before)
        try:
            d, y, got = layer()
        finally:
            torch.set_default_dtype(before)
        expect_dispatched(d, inputs, rank)
        expect_same(y, inputs.sums(rank), f"combine, {dtype} by default")
        expect_same(got, want, f"gradients, {dtype} by default")


def other_shapes(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> None:
    """Rows may have several dimensions, or none."""

    def shaped(inputs: Inputs, reshape: Callable[[Any], Tensor]) -> Inputs:
        return replace(
            inputs,
            x=tuple(map(reshape, inputs.x)),
            outputs=tuple(map(reshape, inputs.outputs)),
            host=None if inputs.host is None else shaped(inputs.host, reshape),
        )

    expect_round_trip(shuffle, shaped(inputs, lambda t: t.unflatten(1, (2, 3, 4))), rank)
    if inputs.case.device == "cpu":  # the CUDA engine moves 16 bytes at once
        expect_round_trip(shuffle, shaped(inputs, lambda t: t[:, 0]), rank)


VARIANTS: dict[str, Variant] = {
    each.__name__: each
    for each in (
        plain_sum,
        other_dtype_out,
        tuple_out,
        other_rows_by_plan,
        without_gradients,
        late_combines,
        strided,
        other_default_dtype,
        other_shapes,
    )
}


def run(rank: int, name: str, engine: str) -> None:
    group = subgroup((0, 1, 2))
    case = replace(CASE, device=device_of(engine))
    if group is not None:
        with case.shuffle(group, engine) as shuffle:
            VARIANTS[name](shuffle, draw(case), dist.get_rank(group))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(pool: RankPool, engine: str, name: str) -> None:
    pool.run(run, name, engine)
