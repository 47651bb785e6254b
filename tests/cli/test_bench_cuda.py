"""The benchmark on GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fusco.bench import (
    BASELINES,
    BenchConfig,
    Measurement,
    plot_measurements,
    read_jsonl,
    run_bench,
)
from fusco.bench.place import find_place
from fusco.cli import app
from fusco.testing.ranks import RankPool

pytestmark = pytest.mark.gpu

NUM_RANKS = 2
CONFIG = BenchConfig(
    num_ranks=NUM_RANKS,
    num_tokens=64,
    hidden_size=512,
    num_experts=16,
    device="cuda",
    iterations=5,
    baselines=BASELINES["cuda"],
)
PAIR = {"dispatch", "combine", "total"}


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    if torch.cuda.device_count() < NUM_RANKS:
        pytest.skip(f"needs {NUM_RANKS} GPUs, of which NCCL wants one a rank")
    with RankPool(NUM_RANKS, device="cuda", timeout_s=120.0) as pool:
        yield pool


def by_entrant(measurements: list[Measurement]) -> dict[tuple[str, str, int | None], set[str]]:
    found: dict[tuple[str, str, int | None], set[str]] = {}
    for m in measurements:
        assert 0 < m.p10_ms <= m.p50_ms <= m.p90_ms
        num_sms = None if m.is_baseline else m.num_sms
        found.setdefault((m.engine, m.mode, num_sms), set()).add(m.op)
    return found


def test_small_batches_are_measured_in_all_modes(gpus: RankPool, tmp_path: Path) -> None:
    measured = run_bench(replace(CONFIG, graph=True, backward=True, num_sms=(16,)), gpus)
    found = by_entrant(measured)
    assert found["cuda", "eager", None] == {*PAIR, "forward_backward"}
    assert found["cuda", "queued", None] == PAIR
    assert found["cuda", "eager", 16] == PAIR
    for mode in ("static", "static eager", "graph"):
        assert found["cuda", mode, None] == {"total"}
    assert found["nccl", "eager", None] == found["nccl", "queued", None] == PAIR
    lead = {m.mode: m.head_start_ms for m in measured}
    assert lead["eager"] == lead["static eager"] == 0
    assert lead["queued"] == lead["static"] == lead["graph"] > 0.5
    pytest.importorskip("matplotlib")
    plot_measurements(measured, tmp_path / "plot.png")


def test_large_batches_are_measured_queued(gpus: RankPool) -> None:
    found = by_entrant(run_bench(replace(CONFIG, num_tokens=1024), gpus))
    for engine in ("cuda", "nccl"):
        assert found[engine, "queued", None] == PAIR
        assert found[engine, "eager", None] == {"total"}


def measured_ms(rank: int) -> dict[str, float]:
    """Half a millisecond of the host's work, and a kernel."""
    place = find_place(CONFIG)
    x = torch.zeros(1024, device=place.device)

    def work() -> None:
        until = time.perf_counter() + 5e-4
        while time.perf_counter() < until:
            pass
        x.add_(1)

    ms = {}
    for mode, clock in place.clocks.items():
        spans = [clock.time(work)[1] for _ in range(20)]
        ms[mode] = sorted(1e3 * (end - begin) for begin, end in spans)[10]
    return ms


def test_the_hosts_work_is_inside_eager_times_only(gpus: RankPool) -> None:
    for ms in gpus.run(measured_ms):
        assert ms["eager"] > 0.5
        assert ms["queued"] < 0.1


def test_command_measures_gpus_and_writes_records(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    arguments = [
        *("bench", "--device", "cuda", "--num-tokens", "64", "--hidden-size", "512"),
        *("--iterations", "3", "--num-sms", "8,16", "--graph", "--output", str(path)),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    records = read_jsonl(path)
    assert {m.device for m in records} == {"cuda"}
    assert {m.num_sms for m in records if m.engine == "cuda"} == {None, 8, 16}
    assert {m.mode for m in records} == {"eager", "queued", "static", "static eager", "graph"}
