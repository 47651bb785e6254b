"""Gradients of rows, weights and expert outputs, in fp64, against autograd of the dense code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fusco
from fusco.testing import dense
from fusco.testing.cases import Case, Inputs, device_of, draw, expect, expect_close
from fusco.testing.gradients import expect_gradients, expert, leaves
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(9, 0, 20, 3), hidden_size=6, top_k=4, num_experts=8, dtype=torch.float64)
CASES = {
    "plain": CASE,
    "nodes": replace(CASE, ranks_per_node=2, routing="holes"),
    "repeated": replace(CASE, routing="repeated", expert_alignment=4),
    # Only rank 3 receives rows: the others take part in both backwards with none.
    "rows-on-one-rank": replace(CASE, routing="one-expert", num_tokens=(5, 0, 0, 2)),
    "nobody": replace(CASE, routing="nobody"),
    "unweighted": replace(CASE, weighted=False),
}


def on(case: Case, engine: str) -> Case:
    return replace(case, device=device_of(engine))


def gradients(rank: int, case: Case, engine: str) -> None:
    group = subgroup(range(case.num_ranks))
    if group is not None:
        expect_gradients(case, group, engine)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_dense(pool: RankPool, engine: str, name: str) -> None:
    pool.run(gradients, on(CASES[name], engine), engine)


def weights_alone(rank: int, case: Case, engine: str) -> None:
    """Their gradients are the same where rows want none."""
    group = subgroup(range(case.num_ranks))
    if group is None:
        return
    inputs, found = draw(case), []
    assert inputs.topk_weights is not None
    with case.shuffle(group, engine) as shuffle:
        for also_rows in (True, False):
            x = inputs.x[rank]
            assert isinstance(x, Tensor)
            x = x.clone().requires_grad_(also_rows)
            weights = inputs.topk_weights[rank].clone().requires_grad_()
            d = shuffle.dispatch(x, inputs.topk_idx[rank], weights)
            y = shuffle.combine(expert(d.tokens, inputs.outputs[rank]), d)
            found.append(torch.autograd.grad(y.square().sum(), weights)[0])
    expect_close(found[1], found[0], 1e-6, "gradient of topk_weights alone")


def test_weights_alone_may_want_gradients(pool: RankPool, engine: str) -> None:
    pool.run(weights_alone, on(CASE, engine), engine)


def test_weights_alone_of_narrow_rows(pool: RankPool, host_engine: str) -> None:
    case = replace(CASE, hidden_size=1, dtype=torch.float32, ranks_per_node=2)
    pool.run(weights_alone, case, host_engine)


def directional(rank: int, case: Case, engine: str) -> tuple[float, float]:
    """Along one direction of all ranks' rows: by autograd, and by central differences."""
    group = subgroup(range(case.num_ranks))
    if group is None:
        return 0.0, 0.0
    inputs = draw(case)
    x, bias = inputs.x[rank], inputs.outputs[rank]
    assert isinstance(x, Tensor)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(rank))
    direction = direction.to(x.device)

    with case.shuffle(group, engine) as shuffle:

        def loss(rows: Tensor) -> Tensor:
            d = shuffle.dispatch(rows, inputs.topk_idx[rank], inputs.weights_of(rank))
            assert isinstance(d.tokens, Tensor)
            return shuffle.combine(expert(d.tokens, bias), d).square().sum()

        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        step = 1e-6
        rise = loss(x + step * direction) - loss(x - step * direction)
    return float((gradient * direction).sum()), float(rise) / (2 * step)


def test_gradients_equal_finite_differences(pool: RankPool, engine: str) -> None:
    case = on(replace(CASE, num_tokens=(6, 3, 0), num_experts=6), engine)
    by_rank = pool.run(directional, case, engine)
    by_autograd, by_difference = (sum(column) for column in zip(*by_rank, strict=True))
    assert by_autograd == pytest.approx(by_difference, rel=1e-6)
    assert abs(by_autograd) > 1e-3


def partial_gradients(rank: int, engine: str) -> list[bool]:
    """What gets a gradient when only some leaves, and not the same on all ranks, want one."""
    case = on(replace(CASE, num_tokens=(4, 4)), engine)
    group = subgroup((0, 1))
    if group is None:
        return []
    inputs = draw(case)
    x, weights, bias = inputs.x[rank], inputs.weights_of(rank), inputs.outputs[rank]
    assert isinstance(x, Tensor)
    assert weights is not None
    with case.shuffle(group, engine) as shuffle:
        # The router alone.
        weights.requires_grad_()
        d = shuffle.dispatch(x, inputs.topk_idx[rank], weights)
        assert isinstance(d.tokens, Tensor)
        shuffle.combine(d.tokens * bias, d).sum().backward()
        router = weights.grad is not None and x.grad is None
        weights.grad = None
        weights.requires_grad_(False)
        # The experts alone.
        bias.requires_grad_()
        d = shuffle.dispatch(x, inputs.topk_idx[rank], weights)
        assert isinstance(d.tokens, Tensor)
        shuffle.combine(d.tokens * bias, d).sum().backward()
        experts = bias.grad is not None
        # Nothing.
        with torch.no_grad():
            d = shuffle.dispatch(x, inputs.topk_idx[rank], weights)
            assert isinstance(d.tokens, Tensor)
            nothing = not shuffle.combine(d.tokens * bias, d).requires_grad
    return [router, experts, nothing]


def test_only_some_leaves_want_gradients(pool: RankPool, engine: str) -> None:
    assert pool.run(partial_gradients, engine)[:2] == [[True] * 3] * 2


def double_use(rank: int, engine: str) -> None:
    """Two layers that share a plan, and rows that are used twice, add their gradients."""
    case = on(replace(CASE, num_tokens=(5, 8, 2), num_experts=6), engine)
    group = subgroup((0, 1, 2))
    if group is None:
        return
    inputs = draw(case)
    leaf = inputs.x[rank].clone().requires_grad_()  # type: ignore[union-attr]
    with case.shuffle(group, engine) as shuffle:
        first = shuffle.dispatch(leaf, inputs.topk_idx[rank], inputs.weights_of(rank))
        assert isinstance(first.tokens, Tensor)
        y = leaf + shuffle.combine(first.tokens.sin(), first)
        second = shuffle.dispatch(y, topk_weights=inputs.weights_of(rank), plan=first.plan)
        assert isinstance(second.tokens, Tensor)
        (got,) = torch.autograd.grad(shuffle.combine(second.tokens.cos(), second).sum(), leaf)

    host = inputs.host or inputs
    x = [t.clone().requires_grad_() for t in host.x]  # type: ignore[union-attr]
    everyone = range(case.num_ranks)

    def layer(rows: list[Tensor], wave: str) -> list[Tensor]:
        outputs = [getattr(dense.dispatch(inputs.layout, rows, r), wave)() for r in everyone]
        return [dense.combine(inputs.layout, outputs, r, host.weights_of(r)) for r in everyone]

    hidden = [a + b for a, b in zip(x, layer(x, "sin"), strict=True)]
    loss = torch.stack([y.sum() for y in layer(hidden, "cos")]).sum()
    (want,) = torch.autograd.grad(loss, x[rank])
    expect_close(got, want, 1e-12, "gradient through two layers")


def test_two_layers_share_a_plan(pool: RankPool, engine: str) -> None:
    pool.run(double_use, engine)


def without_graph(rank: int, engine: str) -> None:
    """A rank that received no row skips its experts, so its outputs have no graph."""
    case = on(CASES["rows-on-one-rank"], engine)
    group = subgroup((0, 1, 2, 3))
    if group is None:
        return
    inputs = draw(case)
    leaf = inputs.x[rank].clone().requires_grad_()  # type: ignore[union-attr]
    weights = inputs.weights_of(rank)
    assert weights is not None
    weights.requires_grad_()
    with case.shuffle(group, engine) as shuffle:
        d = shuffle.dispatch(leaf, inputs.topk_idx[rank], weights)
        assert isinstance(d.tokens, Tensor)
        experts_ran = len(d.tokens) > 0
        y = shuffle.combine(d.tokens * 3 if experts_ran else torch.empty_like(d.tokens), d)
        y.sum().backward()
    assert weights.grad is not None
    assert leaf.grad is not None
    # The one expert chosen by all multiplies by 3, and each token chose it top_k times.
    expect(experts_ran == (rank == 3), "rows on rank 3 only")
    want = 3 * weights.detach().sum(1, keepdim=True).to(leaf.dtype).expand_as(leaf)
    expect_close(leaf.grad, want, 1e-6, "x")
    want = 3 * leaf.detach().sum(1, keepdim=True).expand_as(weights)
    expect_close(weights.grad, want.to(torch.float32), 1e-6, "topk_weights")


def test_rank_whose_outputs_have_no_graph(pool: RankPool, engine: str) -> None:
    pool.run(without_graph, engine)


def twice(rank: int, engine: str) -> None:
    """A graph that is kept goes backward again."""
    case = on(replace(CASE, num_tokens=(5, 8)), engine)
    group = subgroup((0, 1))
    if group is None:
        return
    inputs = draw(case)
    leaf = inputs.x[rank].clone().requires_grad_()  # type: ignore[union-attr]
    with case.shuffle(group, engine) as shuffle:
        d = shuffle.dispatch(leaf, inputs.topk_idx[rank], inputs.weights_of(rank))
        assert isinstance(d.tokens, Tensor)
        loss = shuffle.combine(d.tokens.sin(), d).square().sum()
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(loss, leaf)
    expect(torch.equal(first, second), "the second backward differs")


def test_backward_twice(pool: RankPool, engine: str) -> None:
    pool.run(twice, engine)


def of_a_tuple(rank: int, engine: str) -> None:
    """Every part of a tuple has its gradient, in low precision too."""
    case = replace(CASE, num_tokens=(5, 8), hidden_size=16, dtype=torch.bfloat16)
    case = on(case, engine)
    group = subgroup((0, 1))
    if group is None:
        return
    inputs = draw(case)

    def halves(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        x, _, _ = leaves(inputs)
        return [(t[:, :8].detach().requires_grad_(), t[:, 8:].detach().requires_grad_()) for t in x]

    parts = halves(inputs)
    with case.shuffle(group, engine) as shuffle:
        d = shuffle.dispatch(parts[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
        wide, narrow = d.tokens
        y = shuffle.combine(wide * narrow[:, :1], d)
        got = torch.autograd.grad(y.float().sum(), parts[rank])
    host = inputs.host or inputs
    parts, everyone = halves(host), range(case.num_ranks)
    outputs = []
    for r in everyone:
        rows = [dense.dispatch(inputs.layout, [p[i] for p in parts], r) for i in range(2)]
        outputs.append(rows[0] * rows[1][:, :1])
    sums = [dense.combine(inputs.layout, outputs, r, host.weights_of(r)) for r in everyone]
    want = torch.autograd.grad(torch.stack([y.float().sum() for y in sums]).sum(), parts[rank])
    for part, (one, other) in enumerate(zip(got, want, strict=True)):
        expect_close(one, other, 0.03, f"gradient of part {part}")


def test_gradients_of_a_tuple(pool: RankPool, engine: str) -> None:
    pool.run(of_a_tuple, engine)


def of_complex_rows(rank: int, engine: str) -> list[str]:
    """The errors of one rank's complex rows that want a gradient, compiled too."""
    group = subgroup((0, 1))
    if group is None:
        return []
    inputs = draw(replace(CASE, num_tokens=(5, 8), dtype=torch.float32))
    x = inputs.x[rank]
    assert isinstance(x, Tensor)
    rows = torch.complex(x[:, ::2], x[:, 1::2])
    errors = []
    with inputs.case.shuffle(group, engine) as shuffle:

        def layer(rows: Tensor) -> Tensor:
            d = shuffle.dispatch(rows, inputs.topk_idx[rank], inputs.weights_of(rank))
            assert isinstance(d.tokens, Tensor)
            return d.tokens.abs()

        for each in (layer, torch.compile(layer, backend="aot_eager")):
            with torch.no_grad():
                each(rows)
            try:
                each(rows.detach().requires_grad_(rank == 1))
            except fusco.InputError as error:
                errors.append(str(error))
    return errors


def test_complex_rows_have_no_gradients(pool: RankPool, host_engine: str) -> None:
    for errors in pool.run(of_complex_rows, host_engine)[:2]:
        assert len(errors) == 2
        assert all("complex64 that requires a gradient" in text for text in errors)
