"""Tensors and modules do what those of torch do: lazy conjugates, writing in place, copies."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

import fusco
from fusco.testing.cases import (
    Case,
    Inputs,
    device_of,
    draw,
    expect_close,
    expect_dispatched,
    expect_round_trip,
    expect_same,
)
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(5, 0, 3), hidden_size=16, top_k=2, num_experts=6)


def rows_of(inputs: Inputs, rank: int) -> Tensor:
    x = inputs.x[rank]
    assert isinstance(x, Tensor)
    return x


def move_lazy(rank: int, engine: str) -> None:
    """Rows that torch has conjugated or negated by nothing but a mark."""
    case, group = replace(CASE, device=device_of(engine)), subgroup((0, 1, 2))
    if group is None:
        return
    inputs = draw(case)
    x, outputs = rows_of(inputs, rank), inputs.outputs[rank]
    complex_rows = torch.complex(x[:, :8], x[:, 8:])
    with case.shuffle(group, engine) as shuffle:
        # Marked as they are, and by operators, which a Parameter goes through.
        for mark in (lambda rows: rows, torch.nn.Parameter):
            d = shuffle.dispatch(mark(x), inputs.topk_idx[rank], inputs.weights_of(rank))
            conjugated = shuffle.dispatch(complex_rows.conj(), plan=d.plan).tokens
            expect_same(conjugated, torch.complex(d.tokens[:, :8], -d.tokens[:, 8:]), "conjugated")
            negated = shuffle.dispatch(mark(torch._neg_view(x)), plan=d.plan).tokens
            expect_same(negated, -d.tokens, "negated")
            y = shuffle.combine(mark(torch._neg_view(outputs)), d)
            expect_same(-y, inputs.sums(rank), "combine")
            weights = inputs.weights_of(rank)
            assert weights is not None
            weighted = shuffle.dispatch(mark(x), plan=d.plan, topk_weights=torch._neg_view(weights))
            expect_same(weighted.row_weights, -d.row_weights, "weights")
            row_weights = torch._neg_view(d.row_weights)
            y = shuffle.combine(mark(outputs), replace(d, row_weights=row_weights))
            expect_same(-y, inputs.sums(rank), "combine by weights")


def test_lazily_conjugated_rows(pool: RankPool, engine: str) -> None:
    pool.run(move_lazy, engine)


def backward_of_lazy(rank: int, engine: str) -> None:
    """Gradients that arrive so, of a combine and through it of a dispatch."""
    case, group = replace(CASE, device=device_of(engine)), subgroup((0, 1, 2))
    if group is None:
        return
    inputs = draw(case)
    leaf, weights = rows_of(inputs, rank).clone().requires_grad_(), inputs.weights_of(rank)
    assert weights is not None
    weights.requires_grad_()
    with case.shuffle(group, engine) as shuffle:
        d = shuffle.dispatch(leaf, inputs.topk_idx[rank], weights)
        for result, of in (
            (shuffle.combine(d.tokens, d), leaf),
            (d.tokens, leaf),
            (d.row_weights, weights),
        ):
            plain = torch.ones_like(result)
            (want,) = torch.autograd.grad(result, of, plain, retain_graph=True)
            lazy = torch._neg_view(plain)
            (got,) = torch.autograd.grad(result, of, lazy, retain_graph=True)
            expect_same(got, -want, "gradient")
        negated = torch._neg_view(d.row_weights.detach())
        plain, lazy = (
            torch.autograd.grad(
                shuffle.combine(d.tokens, replace(d, row_weights=each)).sum(),
                leaf,
                retain_graph=True,
            )
            for each in (d.row_weights.detach(), negated)
        )
        expect_same(lazy[0], -plain[0], "gradient by weights")


def test_lazily_negated_gradients(pool: RankPool, engine: str) -> None:
    pool.run(backward_of_lazy, engine)


def write_in_place(rank: int, engine: str) -> None:
    """Results are written to where gradients are wanted, of functions and of operators."""
    case, group = replace(CASE, device=device_of(engine)), subgroup((0, 1, 2))
    if group is None:
        return
    inputs = draw(case)
    x, weights = rows_of(inputs, rank), inputs.weights_of(rank)
    assert weights is not None
    gradients = []
    with case.shuffle(group, engine) as shuffle:
        for kind in (torch.Tensor, torch.nn.Parameter):
            for in_place in (False, True):
                leaf = kind(x.clone()).requires_grad_()
                d = shuffle.dispatch(leaf, inputs.topk_idx[rank], weights.clone().requires_grad_())
                again = shuffle.dispatch(leaf, topk_weights=weights, plan=d.plan)
                if in_place:
                    d.tokens.mul_(2)
                    d.row_weights.mul_(3)
                    again.tokens.add_(1)
                else:
                    tokens, row_weights = d.tokens * 2, d.row_weights * 3
                    d = replace(d, tokens=tokens, row_weights=row_weights)
                    again = replace(again, tokens=again.tokens + 1)
                y = shuffle.combine(d.tokens, d)
                z = shuffle.combine(again.tokens, again)
                if in_place:
                    y += z
                else:
                    y = y + z
                y.square().sum().backward()
                gradients.append(leaf.grad)
    for each in gradients[1:]:
        expect_same(each, gradients[0], "gradient of x")


def test_results_are_written_in_place(pool: RankPool, engine: str) -> None:
    pool.run(write_in_place, engine)


class Layer(torch.nn.Module):
    """Holds a Shuffle, as layers do."""

    def __init__(self, shuffle: fusco.Shuffle) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.scale = torch.nn.Parameter(torch.ones(()))


def copy_layer(rank: int, engine: str) -> None:
    """A copy of a module, as of one whose weights are averaged, has the Shuffle of the original."""
    case, group = replace(CASE, device=device_of(engine)), subgroup((0, 1, 2))
    if group is None:
        return
    with case.shuffle(group, engine) as shuffle:
        layer = copy.deepcopy(Layer(shuffle))
        assert layer.shuffle is shuffle
        expect_round_trip(layer.shuffle, draw(case), rank)


def test_a_module_with_a_shuffle_is_copied(pool: RankPool, engine: str) -> None:
    pool.run(copy_layer, engine)


def weigh_in_other_words(rank: int, engine: str) -> None:
    """`weighted` is taken for its truth, again and again."""
    case, group = replace(CASE, device=device_of(engine)), subgroup((0, 1, 2))
    if group is None:
        return
    inputs = draw(case)
    with case.shuffle(group, engine) as shuffle:
        d = shuffle.dispatch(rows_of(inputs, rank), inputs.topk_idx[rank], inputs.weights_of(rank))
        want = {truth: shuffle.combine(d.tokens, d, weighted=truth) for truth in (True, False)}
        for given in ([1], [], torch.tensor(True), None, torch.tensor(True), 1, 0):
            y = shuffle.combine(d.tokens, d, weighted=given)  # type: ignore[call-overload]
            expect_same(y, want[bool(given)], f"weighted={given}")


def test_weighted_in_other_words(pool: RankPool, engine: str) -> None:
    pool.run(weigh_in_other_words, engine)


def under_another_device(rank: int, engine: str) -> None:
    """A Shuffle is made, and serves, while new tensors are on another device, without values."""
    # Never used before, so that all that is made once a group is made here.
    group = dist.new_group([0, 1, 2])
    if rank > 2:
        return
    nodes = 1 if engine == "two_level" else None
    case = replace(CASE, device=device_of(engine), ranks_per_node=nodes)
    inputs, leaf = draw(case), rows_of(draw(case), rank).clone().requires_grad_()
    size = fusco.Segments(offset=torch.tensor([0]), size=torch.tensor([2]))
    into = [replace(size, offset=torch.tensor([2 * peer])) for peer in range(3)]
    source = torch.full((2,), rank, dtype=torch.uint8, device=case.device)
    with torch.device("meta"):
        shuffle = case.shuffle(group, engine)
    with shuffle:
        expect_round_trip(shuffle, inputs, rank)
        with torch.device("meta"):
            d = shuffle.dispatch(leaf, inputs.topk_idx[rank], inputs.weights_of(rank))
            again = shuffle.dispatch(leaf, topk_weights=inputs.weights_of(rank), plan=d.plan)
            y = shuffle.combine(again.tokens, again)
            (got,) = torch.autograd.grad(y, leaf, leaf.detach())
            if engine != "cuda":
                out = source.new_empty(6)
                fusco.exchange(source, [size] * 3, out, into, group=group, engine=engine)
                assert out.tolist() == [0, 0, 1, 1, 2, 2]
    expect_dispatched(d, inputs, rank)
    weights = inputs.weights_of(rank)
    assert weights is not None
    expect_close(got, leaf * weights.sum(1, keepdim=True), 1e-5, "gradient of x")


def test_another_default_device(pool: RankPool, engine: str) -> None:
    pool.run(under_another_device, engine)
