"""What a user can see: counters, and ranges in torch.profiler."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fusco
from fusco.testing.cases import Case, draw
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(6, 10), hidden_size=32, top_k=2, num_experts=4)


def counted(rank: int, engine: str) -> list[dict[str, object]]:
    """Stats when new, after a round trip, and after a reuse with its backward."""
    group = subgroup((0, 1))
    if group is None:
        return []
    inputs = draw(CASE)
    leaf = inputs.x[rank].clone().requires_grad_()  # type: ignore[union-attr]
    with CASE.shuffle(group, engine) as shuffle:
        seen = [asdict(shuffle.stats())]
        d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
        shuffle.combine(inputs.outputs[rank], d)
        seen.append(asdict(shuffle.stats()))
        if rank == 1:
            time.sleep(1.5)
        again = shuffle.dispatch(leaf, topk_weights=inputs.weights_of(rank), plan=d.plan)
        assert isinstance(again.tokens, torch.Tensor)
        shuffle.combine(again.tokens, again).sum().backward()
        seen.append(asdict(shuffle.stats()))
    return seen


def test_stats(pool: RankPool, host_engine: str) -> None:
    by_rank = pool.run(counted, host_engine)[:2]
    layout = draw(CASE).layout
    rows = [len(choices) for choices in layout.choices]
    imbalance = max(rows) / (sum(rows) / 2)
    row_bytes = CASE.hidden_size * 4
    for rank, (new, once, more) in enumerate(by_rank):
        assert new["num_dispatches"] == new["num_combines"] == new["num_rows"] == 0
        assert new["bytes_to_peer"] == (0, 0)
        assert once["num_dispatches"] == once["num_combines"] == 1
        assert once["num_rows"] == rows[rank]
        assert once["load_imbalance"] == pytest.approx(imbalance)
        # One dispatch, one combine, and the backward of each.
        assert (more["num_dispatches"], more["num_combines"]) == (3, 3)
        assert len(once["wait_s"]) == 2  # type: ignore[arg-type]
        to_other = once["bytes_to_peer"][1 - rank]  # type: ignore[index]
        sent = sum((ranks == 1 - rank).any() for ranks in layout.rank_TK[rank])
        assert to_other >= sent * row_bytes
        assert all(
            a <= b for a, b in zip(once["bytes_to_peer"], more["bytes_to_peer"], strict=True)
        )  # type: ignore[call-overload]
    waited = by_rank[0][2]["wait_s"][1] - by_rank[0][1]["wait_s"][1]
    assert waited > 0.2, "rank 1 came 1.5 s late"


def profiled(rank: int, engine: str) -> list[str]:
    group = subgroup((0, 1))
    if group is None:
        return []
    inputs = draw(CASE)
    leaf = inputs.x[rank].clone().requires_grad_()  # type: ignore[union-attr]
    with (
        CASE.shuffle(group, engine) as shuffle,
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        d = shuffle.dispatch(leaf, inputs.topk_idx[rank], inputs.weights_of(rank))
        assert isinstance(d.tokens, torch.Tensor)
        shuffle.combine(d.tokens, d).sum().backward()
    return sorted({event.name for event in profiler.events() if "fusco" in event.name})


def test_profiler_names_operations_and_stages(pool: RankPool, host_engine: str) -> None:
    for names in pool.run(profiled, host_engine)[:2]:
        operations = {"dispatch", "combine", "dispatch_backward", "combine_backward"}
        ours = {name.removeprefix("fusco::") for name in names if name.startswith("fusco::")}
        assert operations <= ours
        assert {"agree", "plan"} <= ours - operations
        assert len(ours - operations) >= 4


def test_results_are_named() -> None:
    assert list(fusco.Stats.__dataclass_fields__) == [
        "num_dispatches",
        "num_combines",
        "num_rows",
        "bytes_to_peer",
        "load_imbalance",
        "wait_s",
        "window_bytes",
    ]
