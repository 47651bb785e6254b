"""What the GPU benchmark is made of, as far as it runs without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from fusco.bench import (
    BASELINES,
    BenchConfig,
    Measurement,
    measure,
    print_report,
    read_jsonl,
    run_bench,
    summary,
)
from fusco.bench.baselines import AllToAllBaseline
from fusco.bench.clock import HostClock
from fusco.bench.floor import Load, count_load, gpu_floors, mean_floors
from fusco.bench.meters import Meter
from fusco.bench.nccl import NcclBaseline
from fusco.bench.place import Place
from fusco.bench.records import RankRun
from fusco.bench.rows import TorchRows
from fusco.bench.summary import summarise
from fusco.errors import InputError
from fusco.machine import circumstances
from fusco.testing.ranks import RankPool

MODEL = BenchConfig(
    num_ranks=2,
    num_tokens=8192,
    hidden_size=7168,
    num_experts=256,
    device="cuda",
    baselines=("nccl",),
)


def even_load(rank: int) -> Load:
    """Every token goes to both ranks, with four experts on each."""
    everybody = np.full(2, 8192)
    return Load(
        num_tokens=8192,
        num_sources=8192,
        segments=everybody,
        spread=everybody,
        rows=4 * everybody,
    )


def test_floor_of_the_model_is_that_of_the_design() -> None:
    """8,192 tokens of 14 KB on two ranks: 117 MB over the link, 1.17 GB in memory."""
    floors = gpu_floors([even_load(0), even_load(1)], 14336, link_gbps=392, memory_gbps=4300)
    dispatch, combine = floors["dispatch"], floors["combine"]
    assert dispatch.link_ms == pytest.approx(0.2996, abs=1e-3)
    assert dispatch.memory_ms == pytest.approx(1.174e9 / 4300e9 * 1e3, rel=1e-3)
    assert dispatch.ms == max(dispatch.link_ms, dispatch.memory_ms)
    assert combine.link_ms == dispatch.link_ms
    assert combine.memory_ms == pytest.approx((65536 + 3 * 8192) * 14336 / 4300e6, rel=1e-3)
    assert floors["total"].ms == pytest.approx(dispatch.ms + combine.ms)
    assert floors["forward_backward"].ms == pytest.approx(1.40, abs=0.02)
    assert mean_floors([floors, floors]) == floors


def test_load_counts_tokens_once_a_rank_and_rows_once_an_expert() -> None:
    topk_idx = torch.tensor([[0, 1, 4], [5, 5, -1], [-1, -1, -1], [2, 6, 7]])
    load = count_load(topk_idx, rank_of_expert=[0, 0, 0, 0, 1, 1, 2, 2], num_ranks=3)
    assert (load.num_tokens, load.num_sources) == (4, 3)
    assert load.segments.tolist() == [2, 2, 1]
    assert load.spread.tolist() == [1, 1, 1]
    assert load.rows.tolist() == [3, 3, 2]


def test_floor_is_that_of_the_busiest_rank() -> None:
    """Rank 1 sends all to rank 0, which keeps its own: rank 0's memory holds every row."""
    zero, all_, rows = np.array([0, 0]), np.array([100, 0]), np.array([200, 0])
    load = Load(num_tokens=100, num_sources=100, segments=all_, spread=zero, rows=rows)
    floors = gpu_floors([load, load], row_bytes=10**6, link_gbps=100, memory_gbps=1000)
    assert floors["dispatch"].link_ms == 1.0
    assert floors["dispatch"].memory_ms == pytest.approx(0.5)  # 100 read, 400 written
    assert floors["combine"].memory_ms == pytest.approx(0.5)  # 400 read, 100 written


def same_as_gloo(rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rank)
    num_tokens, num_experts = 30 + rank, 16
    x = torch.randn(num_tokens, 24, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    weights, topk_idx = scores.topk(4)
    topk_idx[::3, 1] = -1
    topk_idx[5] = -1
    world = dist.group.WORLD
    assert world is not None
    nccl = NcclBaseline(num_experts=num_experts, group=world, rows=TorchRows())
    gloo = AllToAllBaseline(num_experts=num_experts, group=world)
    a, b = (each.dispatch(x, topk_idx, weights) for each in (nccl, gloo))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.row_weights, b.row_weights)
    assert torch.equal(a.tokens_per_expert, b.tokens_per_expert)
    torch.testing.assert_close(nccl.combine(a.tokens, a), gloo.combine(b.tokens, b))
    assert nccl.wire_bytes == gloo.wire_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gpu_baseline_does_the_same_as_that_of_cpus(pool: RankPool, dtype: torch.dtype) -> None:
    pool.run(same_as_gloo, dtype)


def measure_on_cpu(rank: int, config: BenchConfig) -> RankRun:
    """The GPU's part of the benchmark where there is no GPU."""
    clocks = dict.fromkeys(("eager", "queued"), HostClock())
    place = Place(device=torch.device("cpu"), clocks=clocks, has_nccl=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "find_place", lambda config: place)
        patch.setattr(Place, "make_meters", lambda place: TWO_METERS)
        return measure.measure_rank(rank, config, None)


class NoMeter(Meter):
    def copy(self) -> None:
        pass


TWO_METERS = {"memory": NoMeter(), "link": NoMeter()}


def summarised(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch, config: BenchConfig
) -> dict[tuple[str, str, str], Measurement]:
    runs = pool.run(measure_on_cpu, config)
    facts = circumstances("cpu")
    facts["hardware"] = {**facts["hardware"], "gpu": "none", "num_gpus": 0}
    facts["software"] = {"driver": None}
    monkeypatch.setattr(summary, "circumstances", lambda device: facts)
    return {(m.engine, m.mode, m.op): m for m in summarise(config, runs)}


SMALL = replace(MODEL, num_ranks=8, num_tokens=16, hidden_size=32, iterations=4, warmup=1)
PAIR = ("dispatch", "combine", "total")


def test_small_run_is_measured_in_both_modes(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = summarised(pool, monkeypatch, replace(SMALL, backward=True))
    assert list(found) == [
        *(("cpu", "eager", op) for op in (*PAIR, "forward_backward")),
        *(("cpu", "queued", op) for op in PAIR),
        *(("nccl", mode, op) for mode in ("eager", "queued") for op in PAIR),
    ]
    for mode in ("eager", "queued"):
        total, baseline = found["cpu", mode, "total"], found["nccl", mode, "total"]
        ratio = baseline.p50_ms / total.p50_ms
        assert total.ratio_to_baseline == pytest.approx(ratio, rel=1e-2)
        assert total.floor_ms > 0
        assert baseline.permutes == "torch"
        assert baseline.is_baseline
    assert found["cpu", "eager", "forward_backward"].ratio_to_baseline is None


def test_large_run_is_measured_queued(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = summarised(pool, monkeypatch, replace(SMALL, num_tokens=1024, iterations=2))
    for engine in ("cpu", "nccl"):
        ops = [key[1:] for key in found if key[0] == engine]
        assert ops == [*(("queued", op) for op in PAIR), ("eager", "total")]


def test_deepep_that_is_not_there_is_named(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, baselines=BASELINES["cuda"], iterations=1)
    found = summarised(pool, monkeypatch, config)
    assert {engine for engine, _, _ in found} == {"cpu", "nccl"}
    total = found["cpu", "eager", "total"]
    assert total.left_out == {"deepep": "not installed"}
    console = Console(width=80, record=True, quiet=False, force_terminal=False)
    with console.capture() as capture:
        print_report(list(found.values()), console)
    assert "deepep: not installed." in capture.get()
    assert "…" not in capture.get()


def test_device_and_engine_must_fit() -> None:
    with pytest.raises(InputError, match="bench: device: got 'cpu' with engine 'cuda'"):
        BenchConfig(engine="cuda")
    with pytest.raises(InputError, match="bench: device: got 'tpu'"):
        BenchConfig(device="tpu")
    with pytest.raises(InputError, match="bench: baselines: got 'gloo-kept'"):
        replace(MODEL, baselines=("gloo-kept",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_so() -> None:
    with pytest.raises(InputError, match="bench: device: got 'cuda', expected 'cpu'"):
        run_bench(MODEL)


def test_records_of_cpus_stay_readable() -> None:
    committed = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu.jsonl"
    assert {m.device for m in read_jsonl(committed)} == {"cpu"}
