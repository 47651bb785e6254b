"""Each mechanism of the paper can be switched off; the answer stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fusco
from fusco.testing.cases import Case, draw, expect_close, expect_dispatched, expect_same
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(
    num_tokens=(30, 0, 55, 12),
    hidden_size=40,
    top_k=6,
    num_experts=12,
    dtype=torch.bfloat16,
    routing="repeated",
)
ABLATIONS = {
    "fusion": fusco.Ablation(fusion=False),
    "deduplicate": fusco.Ablation(deduplicate=False),
    "balance": fusco.Ablation(balance=False),
    "all": fusco.Ablation(fusion=False, deduplicate=False, balance=False),
}


def ablated(rank: int, case: Case, engine: str, ablation: fusco.Ablation) -> int:
    """Rows, and sums if tokens travel once, are the same bits; returns the bytes that left."""
    group = subgroup(range(case.num_ranks))
    if group is None:
        return 0
    inputs = draw(case)
    leaf = inputs.x[rank].clone().requires_grad_()  # type: ignore[union-attr]
    with case.shuffle(group, engine, ablation=ablation) as shuffle:
        d = shuffle.dispatch(leaf, inputs.topk_idx[rank], inputs.weights_of(rank))
        y = shuffle.combine(inputs.outputs[rank], d)
        assert isinstance(d.tokens, torch.Tensor)
        again = shuffle.dispatch(leaf.detach(), None, inputs.weights_of(rank), plan=d.plan)
        (gradient,) = torch.autograd.grad(d.tokens.sum(), leaf)
        to_peers = shuffle.stats().bytes_to_peer
    for each in (d, again):
        expect_dispatched(each, inputs, rank)
    if ablation.deduplicate:
        expect_same(y, inputs.sums(rank), "combine")
    else:
        expect_close(y, inputs.sums(rank), 0.05, "combine")
    num_experts_of = (inputs.topk_idx[rank] >= 0).sum(dim=1, keepdim=True)
    expect_close(gradient, num_experts_of.to(gradient.dtype).expand_as(leaf), 0.0, "gradient")
    return sum(to_peers) - to_peers[rank]


@pytest.mark.parametrize("ranks_per_node", [None, 2])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation(pool: RankPool, host_engine: str, name: str, ranks_per_node: int | None) -> None:
    case = replace(CASE, ranks_per_node=ranks_per_node)
    pool.run(ablated, case, host_engine, ABLATIONS[name])


def test_deduplication_saves_bytes(pool: RankPool) -> None:
    once = pool.run(ablated, CASE, "reference", fusco.Ablation())
    each = pool.run(ablated, CASE, "reference", ABLATIONS["deduplicate"])
    assert sum(once) < 0.75 * sum(each)
