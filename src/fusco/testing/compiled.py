"""A layer that torch.compile takes as one graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.testing.cases import Case, draw, expect_same

Layer = TypeVar("Layer", bound=Callable[..., Tensor])


def compiled(layer: Layer, backend: str = "aot_eager", *, dynamic: bool | None = None) -> Layer:
    """A layer as one graph; for the rest see `torch.compile`."""

    @functools.wraps(layer)
    def run(*arguments: Tensor) -> Tensor:
        # Later versions of torch do so by themselves.
        is_old = torch.__version__ < "2.11"
        allow = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
        with allow if is_old else nullcontext():
            y: Tensor = traced(*arguments)
            return y

    traced = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    return cast(Layer, run)


def expect_compiled(case: Case, group: dist.ProcessGroup | None, engine: str) -> None:
    """Two dispatches of one plan and their combines, compiled without a break, give the same sums
    and gradients.

    Args:
        case: with weights, of one tensor of rows.
        group: as many ranks as the case has.
        engine: the engine to check.
    """
    rank, inputs = dist.get_rank(group), draw(case)
    rows, idx, weights = inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank)
    assert isinstance(rows, Tensor)
    assert weights is not None
    with case.shuffle(group, engine) as shuffle:

        def layer(rows: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
            d = shuffle.dispatch(rows, idx, weights)
            again = shuffle.dispatch(rows * 3, topk_weights=weights, plan=d.plan)
            return shuffle.combine(d.tokens * 2, d) + shuffle.combine(again.tokens, again)

        results = []
        for fn in (layer, compiled(layer)):
            leaves = rows.clone().requires_grad_(), weights.clone().requires_grad_()
            y = fn(leaves[0], idx, leaves[1])
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for name, one, other in zip(("sums", "gradient of x", "of weights"), *results, strict=True):
        expect_same(other, one, f"{name}, compiled")
