"""Gradients of one dispatch and combine, against autograd of the dense code."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.testing import dense
from fusco.testing.cases import Case, Inputs, draw, expect_close, expect_same

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def expect_gradients(
    case: Case, group: dist.ProcessGroup | None, engine: str, *, strided: bool = False
) -> None:
    """Gradients of rows, expert outputs and weights equal the dense ones on this rank.

    Args:
        case: of rows in fp64.
        group: as many ranks as the case has.
        engine: the engine to check.
        strided: combine rows of two dimensions, whose elements do not lie in order.
    """
    rank, inputs = dist.get_rank(group), draw(case)
    x, weights, biases = leaves(inputs)
    mine = [x[rank], biases[rank], *([] if weights is None else [weights[rank]])]
    with case.shuffle(group, engine) as shuffle:
        d = shuffle.dispatch(
            x[rank], inputs.topk_idx[rank], None if weights is None else weights[rank]
        )
        outputs = expert(d.tokens, biases[rank])
        if strided:
            sums = shuffle.combine(outputs.unflatten(1, (8, -1)).transpose(1, 2), d)
            y = sums.transpose(1, 2).flatten(1)
        else:
            y = shuffle.combine(outputs, d)
        got = torch.autograd.grad((y.cos() * y).sum(), mine)
    want = _dense_gradients(inputs.host or inputs, rank)
    for name, one, other in zip(("x", "outputs", "topk_weights"), got, want, strict=False):
        expect_close(one, other, TOLERANCE[one.dtype], f"gradient of {name}")


def expect_weighed(case: Case, group: dist.ProcessGroup | None, engine: str) -> None:
    """Gradients of expert outputs, to the bit, and of weights, from given ones of the sums.

    Args:
        case: weighted, of rows in any floating type.
        group: as many ranks as the case has.
        engine: the engine to check.
    """
    rank, inputs = dist.get_rank(group), draw(case)
    of_sums = draw(case, 1).routed_as(inputs)  # its rows are their gradients
    x, weights, outputs = leaves(inputs)
    assert weights is not None, "of a weighted case"
    with case.shuffle(group, engine) as shuffle:
        d = shuffle.dispatch(x[rank].detach(), inputs.topk_idx[rank], weights[rank])
        y = shuffle.combine(outputs[rank], d)
        got = torch.autograd.grad(y, (outputs[rank], weights[rank]), of_sums.x[rank])
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    rows, row_weights = of_sums.rows(rank), inputs.row_weights(rank)
    assert isinstance(rows, Tensor)
    want = (rows.to(wide) * row_weights[:, None].to(wide)).to(case.dtype)
    expect_same(got[0], want, "gradient of outputs")
    products = _products(inputs.host or inputs, of_sums.host or of_sums, rank)
    # Of a size that does not grow with the rows.
    scale = case.hidden_size**-0.5
    expect_close(got[1] * scale, (products * scale).float(), 1e-5, "gradient of topk_weights")


def _products(inputs: Inputs, of_sums: Inputs, rank: int) -> Tensor:
    """fp64 `[T, K]`: of each choice's expert output and the gradient of its token's sum."""
    ranks, slots = inputs.layout.rank_TK[rank], inputs.layout.slot_TK[rank]
    grads = of_sums.x[rank]
    assert isinstance(grads, Tensor)
    products = torch.zeros(ranks.shape, dtype=torch.float64)
    for token, k in (ranks >= 0).nonzero().tolist():
        output = inputs.outputs[int(ranks[token, k])][slots[token, k]]
        products[token, k] = output.double() @ grads[token].double()
    return products


def expert(rows: Tensor, bias: Tensor) -> Tensor:
    """Not linear, and told apart by row, so that a misplaced gradient shows."""
    return (rows * 1.5).sin() * bias


def leaves(inputs: Inputs) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor]]:
    """Rows, weights and a per-row factor of the experts, of every rank, that want gradients."""

    def wanting(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return [each.detach().clone().requires_grad_() for each in tensors]

    weights = inputs.topk_weights
    x: tuple[Tensor, ...] = inputs.x  # type: ignore[assignment] # not of tuples
    return wanting(x), None if weights is None else wanting(weights), wanting(inputs.outputs)


def _dense_gradients(inputs: Inputs, rank: int) -> list[Tensor]:
    x, weights, biases = leaves(inputs)
    everyone = range(inputs.case.num_ranks)
    outputs = [expert(dense.dispatch(inputs.layout, x, r), biases[r]) for r in everyone]
    sums = [
        dense.combine(
            inputs.layout,
            outputs,
            r,
            None if weights is None else weights[r],
            node_of_rank=inputs.case.node_of_rank,
        )
        for r in everyone
    ]
    loss = torch.stack([(y.cos() * y).sum() for y in sums]).sum()
    wanted = [x[rank], biases[rank], *([] if weights is None else [weights[rank]])]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True))
