"""From what ranks measured to records, tables and plots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fusco.bench import (
    BenchConfig,
    Measurement,
    plot_measurements,
    print_comparison,
    print_report,
    read_jsonl,
    write_jsonl,
)
from fusco.bench.records import Entrant, RankRun
from fusco.bench.summary import summarise

MADE = BenchConfig(num_ranks=2, num_tokens=16, top_k=3, hidden_size=512, num_experts=4)
CPU, GLOO = Entrant(engine="cpu"), Entrant(engine="gloo-all_to_all")
ISSUE_KEYS = {
    "op", "engine", "pattern", "num_ranks", "num_nodes", "num_tokens", "hidden_size", "top_k",
    "num_experts", "dtype", "p50_ms", "p10_ms", "p90_ms", "wire_bytes", "hardware", "torch",
    "commit", "floor_ms", "ratio_to_baseline", "copy_gbps", "seed", "iterations", "ablation",
}  # fmt: skip


def by_key(measurements: list[Measurement]) -> dict[tuple[str, str], Measurement]:
    return {(m.engine, m.op): m for m in measurements}


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


def test_report_of_gpus_fits_in_80_columns() -> None:
    gpu = [replace(m, device="cuda", mode="queued") for m in made()]
    gpu += [replace(gpu[2], engine="deepep-v2", num_sms=24), replace(gpu[2], op="forward_backward")]
    text = printed(gpu)
    assert "deepep-v2 24 SMs queued" in text
    assert "…" not in text


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
    quiet = Console(quiet=True)
    assert print_comparison(made(), [*other, made()[0]], quiet)
    assert not print_comparison(made(), other, quiet)


def test_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    zipf = [replace(m, pattern="zipf", p50_ms=2 * m.p50_ms) for m in made()]
    path = tmp_path / "new" / "plot.svg"
    plot_measurements([*made(), *zipf], path)
    assert path.read_text().count("<path") > 20


def test_plot_tells_hidden_sizes_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    other = [replace(m, hidden_size=m.hidden_size // 2) for m in made()]
    both, one = tmp_path / "both.svg", tmp_path / "one.svg"
    plot_measurements([*made(), *other], both)
    plot_measurements(made(), one)
    told = f"hidden {other[0].hidden_size:,}"
    assert told in both.read_text()
    assert told not in one.read_text()


def test_plot_shows_small_batches_and_the_curve_of_gpus(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gpu = [replace(m, device="cuda", engine="cuda") for m in made() if m.engine == "cpu"]
    small = [replace(m, num_tokens=128, mode=mode) for m in gpu for mode in ("eager", "graph")]
    large = [replace(m, num_tokens=8192, mode="queued") for m in gpu]
    curve = [replace(m, num_sms=num_sms) for m in large for num_sms in (24, 48)]
    both, curve_only = tmp_path / "both.svg", tmp_path / "curve.svg"
    plot_measurements([*small, *large, *curve], both)
    plot_measurements(curve, curve_only)
    assert both.stat().st_size > curve_only.stat().st_size
