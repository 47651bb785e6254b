"""A small benchmark from end to end: on a pool, with a given routing, and what it reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import fusco
from fusco.bench import (
    BASELINES,
    BenchConfig,
    Measurement,
    RoutingSet,
    plot_measurements,
    print_comparison,
    print_report,
    read_jsonl,
    run_bench,
    write_jsonl,
)
from fusco.bench.batches import Batch
from fusco.bench.measure import _expect_same
from fusco.bench.patterns import TokenRouting
from fusco.bench.records import Entrant, RankRun, summarise
from fusco.errors import FuscoError, InputError
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
MADE = BenchConfig(num_ranks=2, num_tokens=16, top_k=3, hidden_size=512, num_experts=4)
CPU, GLOO = Entrant(engine="cpu"), Entrant(engine="gloo-all_to_all")
ISSUE_KEYS = {
    "op", "engine", "pattern", "num_ranks", "num_nodes", "num_tokens", "hidden_size", "top_k",
    "num_experts", "dtype", "p50_ms", "p10_ms", "p90_ms", "wire_bytes", "hardware", "torch",
    "commit", "floor_ms", "ratio_to_baseline", "copy_gbps", "seed", "iterations", "ablation",
}  # fmt: skip


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
        ({"pattern": "trace"}, "pattern"),
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
    d = fusco.Dispatched(
        tokens=x,
        tokens_per_expert=torch.tensor([4]),
        expert_offsets=torch.tensor([0, 4]),
        row_weights=torch.ones(4),
        plan=None,  # type: ignore[arg-type]
    )
    _expect_same(batch, (d, x), (d, x * (1 + 2**-8)))
    with pytest.raises(FuscoError, match="bench: sums: "):
        _expect_same(batch, (d, x), (d, x * 1.125))
    other = replace(d, tokens=x.flip(0), row_weights=torch.zeros(4))
    with pytest.raises(FuscoError, match="bench: tokens, row_weights: "):
        _expect_same(batch, (d, x), (other, x))


def rank_run(dispatch: list[float], combine: list[float], copy: list[float]) -> RankRun:
    """A rank that begins everything at 0."""
    spans = {"dispatch": [(0.0, s) for s in dispatch], "combine": [(0.0, s) for s in combine]}
    slow = {op: [(0.0, 10 * s) for _, s in by_iteration] for op, by_iteration in spans.items()}
    wire = {"dispatch": 100.0, "combine": 50.0}
    return RankRun(
        host="here",
        num_nodes=1,
        num_threads=1,
        spans={CPU: spans, GLOO: slow},
        copy_spans=[(0.0, s) for s in copy],
        wire_bytes={CPU: wire, GLOO: wire},
        num_rows=48.0,
    )


def made() -> list[Measurement]:
    return summarise(MADE, made_runs())


def made_runs() -> list[RankRun]:
    return [
        rank_run([1e-3, 5e-3, 2e-3], [1e-3, 1e-3, 9e-3], [0.01, 0.01, 0.01]),
        rank_run([4e-3, 1e-3, 2e-3], [2e-3, 1e-3, 1e-3], [0.02, 0.01, 0.04]),
    ]


def test_an_iteration_takes_as_long_as_its_slowest_rank() -> None:
    found = by_key(made())
    assert found["cpu", "dispatch"].p50_ms == 4.0  # of 4, 5 and 2
    assert found["cpu", "combine"].p50_ms == 2.0  # of 2, 1 and 9
    assert found["cpu", "total"].p50_ms == 6.0  # of 6, 6 and 11
    assert found["cpu", "total"].p90_ms == 10.0
    assert found["cpu", "total"].ratio_to_baseline == 10.0
    assert found["gloo-all_to_all", "total"].ratio_to_baseline == 1.0
    assert found["cpu", "total"].wire_bytes == 300


def test_a_rank_that_begins_late_is_waited_for() -> None:
    """Two ranks on one core, one after the other: the group takes as long as both."""
    first, second = made_runs()
    spans = {"dispatch": [(0.0, 0.003)], "combine": [(0.010, 0.013)]}
    late = {"dispatch": [(0.003, 0.006)], "combine": [(0.013, 0.016)]}
    names = (CPU, GLOO)
    first = replace(first, spans=dict.fromkeys(names, spans), copy_spans=[(0.0, 0.002)])
    second = replace(second, spans=dict.fromkeys(names, late), copy_spans=[(0.002, 0.004)])
    found = by_key(summarise(MADE, [first, second]))["cpu", "total"]
    assert found.p50_ms == 12.0
    assert found.copy_gbps == pytest.approx(2 * 2 * 32 * 2**20 / 0.004 / 1e9, rel=1e-3)
    # Clocks of two hosts have nothing to do with each other.
    apart = by_key(summarise(MADE, [first, replace(second, host="there")]))["cpu", "total"]
    assert apart.p50_ms == 6.0


def test_floor_is_the_bytes_over_the_copy_bandwidth() -> None:
    found = by_key(made())["cpu", "dispatch"]
    gbps = 2 * 2 * 32 * 2**20 / 0.02 / 1e9  # two ranks, read and written, median of 20, 10, 40 ms
    assert found.copy_gbps == pytest.approx(gbps, rel=1e-3)
    num_bytes = 2 * (16 + 48) * 512 * 2
    assert found.floor_ms == pytest.approx(num_bytes / gbps / 1e6, rel=1e-3)
    assert by_key(made())["cpu", "total"].floor_ms == pytest.approx(2 * found.floor_ms, rel=1e-3)


def test_records_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    write_jsonl(made(), path)
    write_jsonl(made(), path)
    lines = path.read_text().splitlines()
    assert len(lines) == 12
    for line in lines:
        assert set(json.loads(line)) >= ISSUE_KEYS
    assert read_jsonl(path) == [*made(), *made()]
    for wrong in ("{}", "text", "[1]"):
        path.write_text(lines[0] + "\n" + wrong + "\n")
        with pytest.raises(ValueError, match="line 2, is no measurement"):
            read_jsonl(path)


def printed(measurements: list[Measurement], record: list[Measurement] | None = None) -> str:
    console = Console(width=80, record=True, quiet=False, force_terminal=False)
    with console.capture() as capture:
        print_report(measurements, console)
        if record is not None:
            print_comparison(measurements, record, console)
    return capture.get()


def test_report_shows_every_number_in_80_columns() -> None:
    text = printed(made())
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    for word in ("gloo-all_to_all", "uniform", "10.00x", "1.00x", "top-3 of 4", "6.00", "60.00"):
        assert word in text
    assert "faster than the baselines in every operation" in text


def test_report_says_where_fusco_loses() -> None:
    slow = [replace(m, p50_ms=1e3) if (m.engine, m.op) == ("cpu", "combine") else m for m in made()]
    text = " ".join(printed(slow).split())
    assert "cpu loses: its combine takes 50.00 times as long as that of gloo-all_to_all" in text
    assert "every operation" not in text
    near = [replace(m, floor_ms=m.p50_ms / 1.9) for m in made()]
    assert "More than 2 times the floor" not in printed(near)
    far = [replace(m, floor_ms=m.p50_ms / 2.1) for m in made()]
    assert "More than 2 times the floor: dispatch, combine, total of cpu" in printed(far)


def test_comparison_takes_the_last_record_of_the_same_configuration() -> None:
    old = [replace(m, p50_ms=99.0) for m in made()]
    new = [replace(m, p50_ms=3 * m.p50_ms) for m in made()]
    other = [replace(m, top_k=7) for m in made()]
    text = printed(made(), [*old, *new, *other])
    assert "3.00" in text
    assert "99.00" not in text
    assert "other hardware" not in text
    elsewhere = [replace(m, hardware={**m.hardware, "cpu": "another"}) for m in made()]
    assert "other hardware" in printed(made(), elsewhere)
    assert "none" in printed(made(), other)


def test_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    zipf = [replace(m, pattern="zipf", p50_ms=2 * m.p50_ms) for m in made()]
    path = tmp_path / "new" / "plot.svg"
    plot_measurements([*made(), *zipf], path)
    assert path.read_text().count("<path") > 20
