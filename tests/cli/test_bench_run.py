"""A small benchmark from end to end: on a pool, with a given routing, and what it reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fusco
from fusco.bench import (
    BASELINES,
    BenchConfig,
    Measurement,
    RoutingSet,
    print_report,
    run_bench,
)
from fusco.bench.batches import Batch
from fusco.bench.patterns import TokenRouting
from fusco.bench.same import expect_same
from fusco.errors import FuscoError, InputError
from fusco.plans import CompactPlan
from fusco.testing.ranks import RankPool

CONFIG = BenchConfig(
    num_ranks=8,
    num_tokens=16,
    hidden_size=32,
    top_k=2,
    num_experts=16,
    iterations=3,
    warmup=1,
)


def by_key(measurements: list[Measurement]) -> dict[tuple[str, str], Measurement]:
    return {(m.engine, m.op): m for m in measurements}


def test_a_run_measures_fusco_and_the_baseline(pool: RankPool, host_engine: str) -> None:
    found = by_key(run_bench(replace(CONFIG, engine=host_engine, baselines=BASELINES["cpu"]), pool))
    ops, names = ("dispatch", "combine", "total"), (host_engine, "gloo-all_to_all", "gloo-kept")
    assert list(found) == [(name, op) for name in names for op in ops]
    for (name, op), m in found.items():
        assert 0 < m.p10_ms <= m.p50_ms <= m.p90_ms
        assert m.floor_ms > 0
        assert m.floor_fraction < 1
        assert (m.num_ranks, m.num_nodes, m.num_tokens, m.dtype) == (8, 1, 16, "bfloat16")
        baseline = found["gloo-all_to_all", op]
        assert m.ratio_to_baseline == pytest.approx(baseline.p50_ms / m.p50_ms, rel=2e-3)
        assert m.is_baseline == (name != host_engine)
    for name in names:
        one_way = found[name, "dispatch"].wire_bytes + found[name, "combine"].wire_bytes
        assert found[name, "total"].wire_bytes == pytest.approx(one_way, abs=1)
    # A token crosses to a rank once in fusco, and once an expert in the baseline.
    assert 0 < found[host_engine, "total"].wire_bytes < found["gloo-all_to_all", "total"].wire_bytes


def test_each_mechanism_is_switched_off_alone(
    pool: RankPool, host_engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, engine=host_engine, ablation="each", pattern="imbalanced")
    measurements = run_bench(replace(config, ranks_per_node=4), pool)
    totals = {(m.engine, m.ablation): m for m in measurements if m.op == "total"}
    names = ("none", "fusion", "planner", "balancer")
    assert list(totals) == [*((host_engine, name) for name in names), ("gloo-all_to_all", "none")]
    whole = totals[host_engine, "none"].wire_bytes
    assert totals[host_engine, "fusion"].wire_bytes == whole
    assert totals[host_engine, "planner"].wire_bytes != whole
    print_report(measurements)
    printed = capsys.readouterr().out
    assert "throughput lost" in printed
    assert "16.6%" in printed


def test_given_routing_is_what_is_measured(pool: RankPool) -> None:
    """Every token stays on its own rank: nothing crosses, and rows are even."""
    own = np.arange(8)[:, None, None] * 2 + np.arange(2)
    idx = np.broadcast_to(own, (1, 8, 16, 2))
    routing = RoutingSet(topk_idx=idx, topk_weights=np.full(idx.shape, 0.5))
    config = replace(CONFIG, pattern="at home", engine="reference")
    for m in run_bench(config, pool, routing):
        assert m.pattern == "at home"
        assert m.load_imbalance == 1.0
        if not m.is_baseline:
            assert m.wire_bytes == 0


def test_nodes_are_those_asked_for(pool: RankPool) -> None:
    config = replace(CONFIG, pattern="imbalanced", ranks_per_node=4, engine="reference")
    assert {m.num_nodes for m in run_bench(config, pool)} == {2}


def test_what_does_not_fit_is_refused(pool: RankPool) -> None:
    with pytest.raises(InputError, match="num_ranks: got 4, expected 8"):
        run_bench(replace(CONFIG, num_ranks=4), pool)
    with pytest.raises(InputError, match="pattern: got 'other'"):
        run_bench(replace(CONFIG, pattern="other"), pool)
    arrays = np.zeros((2, 8, 15, 2))
    with pytest.raises(InputError, match=r"routing.topk_idx: got shape \(2, 8, 15, 2\)"):
        run_bench(CONFIG, pool, RoutingSet(topk_idx=arrays.astype(int), topk_weights=arrays))


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"num_tokens": 0}, "num_tokens"),
        ({"warmup": -1}, "warmup"),
        ({"dtype": "int8"}, "dtype"),
        ({"ablation": "all"}, "ablation"),
        ({"baselines": ("nccl",)}, "baselines"),
        ({"baselines": ()}, "baselines"),
        ({"num_experts": 15}, "num_experts"),
        ({"ranks_per_node": 3}, "ranks_per_node"),
        ({"pattern": "trace"}, "trace"),
        ({"trace": Path("some.npz")}, "pattern"),
    ],
)
def test_a_bad_configuration_names_the_argument(changes: dict[str, object], argument: str) -> None:
    with pytest.raises(InputError, match=f"bench: {argument}: got"):
        replace(CONFIG, **changes)  # type: ignore[arg-type]


def test_a_difference_is_not_measured() -> None:
    """If fusco's rows or sums were wrong, the run would say so instead of giving times."""
    x = torch.randn(4, 8).bfloat16()
    routing = TokenRouting(topk_idx=torch.zeros(4, 1), topk_weights=torch.ones(4, 1))
    batch = Batch(x=x, routing=routing)
    plan = CompactPlan(
        identity=torch.zeros(2, dtype=torch.int64),
        tokens_per_expert=torch.tensor([4]),
        expert_offsets=torch.tensor([0, 4], dtype=torch.int32),
        pairs=torch.zeros((2, 4, 1), dtype=torch.int32),
        links=torch.zeros(0, dtype=torch.int32),
        row_extent=torch.zeros(4, dtype=torch.uint8),
    )
    d = fusco.Dispatched(tokens=x, row_weights=torch.ones(4), plan=plan)
    expect_same(batch, (d, x), (d, x * (1 + 2**-8)))
    with pytest.raises(FuscoError, match="bench: sums: "):
        expect_same(batch, (d, x), (d, x * 1.125))
    other = replace(d, tokens=x.flip(0), row_weights=torch.zeros(4))
    with pytest.raises(FuscoError, match="bench: tokens, row_weights: "):
        expect_same(batch, (d, x), (other, x))
