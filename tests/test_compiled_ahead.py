"""Every loop of the CPU engine is compiled when a Shuffle is made, before anybody waits."""

from __future__ import annotations

from typing import Any

import torch

import fusco
from fusco.engines.cpu.kernels import lists, memory, places, plan, reduce, scatter, waiting
from fusco.testing.ranks import RankPool

MODULES = (lists, memory, places, plan, reduce, scatter, waiting)


def compiled() -> dict[str, set[str]]:
    """The argument types that each loop is compiled for."""
    loops: dict[str, Any] = {}
    for module in MODULES:
        loops |= {name: each for name, each in vars(module).items() if hasattr(each, "signatures")}
    return {name: set(map(str, loop.signatures)) for name, loop in loops.items()}


def compiled_late(rank: int, dtype: torch.dtype) -> dict[str, set[str]]:
    group = torch.distributed.group.WORLD
    with fusco.Shuffle(
        num_experts=16, hidden_size=16, top_k=2, max_tokens=16, dtype=dtype, group=group
    ) as shuffle:
        ahead = compiled()
        x = torch.randn(16, 16).to(dtype).requires_grad_()
        weights, topk_idx = torch.randn(16, 16).softmax(dim=-1).topk(2)
        d = shuffle.dispatch(x, topk_idx, weights.requires_grad_())
        shuffle.combine(d.tokens * 2, d).sum().backward()
        with torch.no_grad():
            again = shuffle.dispatch(x, topk_weights=weights, plan=d.plan)
            outputs = shuffle.empty_like(again.tokens).copy_(again.tokens)
            shuffle.combine(outputs, again)
        return {name: late for name, each in compiled().items() if (late := each - ahead[name])}


def test_nothing_is_compiled_in_an_operation(pool: RankPool) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert not any(pool.run(compiled_late, dtype))
