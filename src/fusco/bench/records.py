"""A measurement and the facts that go with it, as one JSON object a line."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fusco
from fusco.bench.clock import Span
from fusco.bench.config import BASELINES, BenchConfig
from fusco.bench.floor import Floor, Load, floor_ms, gpu_floors, mean_floors
from fusco.bench.machine import gpu_software, hardware, source_commit
from fusco.bench.meters import copy_gbps, link_gbps

PAIR_OPS = ("dispatch", "combine", "total")
OPS = (*PAIR_OPS, "forward_backward")


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """Who is measured.

    Attributes:
        engine: fusco's engine, or a baseline.
        mode: eager; in place: with expert outputs in `Shuffle.empty_like`; or graph: replayed in a
            CUDA graph.
        num_sms: the most multiprocessors it may take; None: all.
        permutes: what a GPU baseline permutes with: triton or torch.
    """

    engine: str
    mode: str = "eager"
    num_sms: int | None = None
    permutes: str | None = None


@dataclass(frozen=True, kw_only=True)
class RankRun:
    """What one rank measured.

    Attributes:
        host: equal for ranks of one host.
        num_nodes: of the group.
        num_threads: of this rank.
        spans: by entrant and operation, an entry an iteration.
        copy_spans: of the copies in memory.
        link_spans: of the copies to the next rank, on GPUs.
        wire_bytes: by entrant and operation, mean of an iteration.
        num_rows: received, mean of an iteration.
        loads: what each routing moves.
        left_out: by baseline, why it is not measured.
    """

    host: str
    num_nodes: int
    num_threads: int
    spans: dict[Entrant, dict[str, list[Span]]]
    copy_spans: list[Span]
    link_spans: list[Span] = field(default_factory=list)
    wire_bytes: dict[Entrant, dict[str, float]]
    num_rows: float
    loads: list[Load] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One operation of one entrant. What is not described here is as in `BenchConfig` or `Entrant`.

    Attributes:
        op: dispatch, combine, or total, which is both: on a GPU, where the host runs ahead of the
            device, measured as one span; on a CPU their sum. forward_backward: total and its
            gradients in x and the weights.
        engine: fusco's engine, or a baseline.
        num_tokens: tokens of each rank.
        p50_ms: median over iterations, until the slowest rank is done; p10_ms and p90_ms likewise.
        wire_bytes: bytes that cross from rank to rank, all ranks together, mean of an iteration.
        copy_gbps: median copy bandwidth, read plus written, of all ranks together; on GPUs of each
            rank, while all copy.
        floor_ms: see `fusco.bench.floor`.
        ratio_to_baseline: the first baseline's p50 over this one's: above 1 is faster than it;
            None if no baseline was measured.
        load_imbalance: mean rows of the busiest rank over those of all.
        num_threads: threads of each rank.
        hardware: cpu, cores and memory_gib of the machine of rank 0, and for GPUs gpu and num_gpus.
        commit: of the sources that ran, with "-dirty" if they were changed; None if unknown.
        link_gbps: median bandwidth from a GPU to the next, each way at once.
        floor_link_ms: of the floor, what the links need; floor_memory_ms likewise.
        software: on GPUs the versions of driver, cuda, nccl, triton and deep_ep.
        left_out: by baseline, why it was not measured.
    """

    op: str
    engine: str
    pattern: str
    num_ranks: int
    num_nodes: int
    num_tokens: int
    hidden_size: int
    top_k: int
    num_experts: int
    dtype: str
    ablation: str
    p50_ms: float
    p10_ms: float
    p90_ms: float
    wire_bytes: int
    copy_gbps: float
    floor_ms: float
    ratio_to_baseline: float | None
    load_imbalance: float
    seed: int
    iterations: int
    num_threads: int
    hardware: dict[str, Any]
    torch: str
    python: str
    fusco: str
    commit: str | None
    device: str = "cpu"
    mode: str = "eager"
    num_sms: int | None = None
    permutes: str | None = None
    link_gbps: float | None = None
    floor_link_ms: float | None = None
    floor_memory_ms: float | None = None
    software: dict[str, str | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def is_baseline(self) -> bool:
        """Whether this is not fusco but what it is compared with."""
        return self.engine in BASELINES[self.device]

    @property
    def label(self) -> str:
        """The engine, and how it differs from the engine alone."""
        parts = [self.engine]
        if self.num_sms is not None:
            parts.append(f"{self.num_sms} SMs")
        if self.mode != "eager":
            parts.append(self.mode)
        return ", ".join(parts)

    @property
    def floor_fraction(self) -> float:
        """The floor over the time: 1 would be as fast as memory allows."""
        return self.floor_ms / self.p50_ms


def summarise(config: BenchConfig, runs: Sequence[RankRun]) -> list[Measurement]:
    """From what every rank measured to one measurement an entrant and operation."""
    first = runs[0]
    num_rows = [run.num_rows for run in runs]
    yardstick = _yardstick(config, runs)
    times = {entrant: _group_ms(runs, entrant) for entrant in first.spans}
    p50 = {
        (entrant, op): float(np.median(ms))
        for entrant in times
        for op, ms in times[entrant].items()
    }
    baseline = next((each for each in times if each.engine in config.baselines), None)

    def measurement(entrant: Entrant, op: str) -> Measurement:
        ms = times[entrant][op]
        reference = None if baseline is None else p50.get((baseline, op))
        floor = yardstick.floors[op]
        return Measurement(
            op=op,
            engine=entrant.engine,
            pattern=config.pattern,
            num_ranks=config.num_ranks,
            num_nodes=first.num_nodes,
            num_tokens=config.num_tokens,
            hidden_size=config.hidden_size,
            top_k=config.top_k,
            num_experts=config.num_experts,
            dtype=config.dtype,
            ablation=config.ablation,
            p50_ms=_rounded(p50[entrant, op]),
            p10_ms=_rounded(np.percentile(ms, 10)),
            p90_ms=_rounded(np.percentile(ms, 90)),
            wire_bytes=round(sum(_wire_bytes(run, entrant, op) for run in runs)),
            copy_gbps=_rounded(yardstick.copy_gbps),
            floor_ms=_rounded(floor.ms),
            ratio_to_baseline=None if reference is None else _rounded(reference / p50[entrant, op]),
            load_imbalance=_rounded(max(num_rows) / max(sum(num_rows) / len(num_rows), 1.0)),
            seed=config.seed,
            iterations=config.iterations,
            num_threads=first.num_threads,
            hardware=hardware(config.device),
            torch=torch.__version__,
            python=platform.python_version(),
            fusco=fusco.__version__,
            commit=source_commit(),
            device=config.device,
            mode=entrant.mode,
            num_sms=entrant.num_sms,
            permutes=entrant.permutes,
            left_out=first.left_out,
            **_gpu_facts(yardstick, floor),
        )

    return [measurement(entrant, op) for entrant in times for op in times[entrant]]


@dataclass(frozen=True, kw_only=True)
class _Yardstick:
    """What the machine can do, measured in the same run; `link_gbps` on GPUs."""

    copy_gbps: float
    link_gbps: float | None
    floors: dict[str, Floor]


def _yardstick(config: BenchConfig, runs: Sequence[RankRun]) -> _Yardstick:
    row_bytes = config.hidden_size * config.torch_dtype.itemsize
    copy_s = float(np.median(_group_seconds(runs, [run.copy_spans for run in runs])))
    if config.device == "cuda":
        memory = copy_gbps("cuda", 1, copy_s)
        link_s = float(np.median(_group_seconds(runs, [run.link_spans for run in runs])))
        link = link_gbps(link_s)
        floors = [
            gpu_floors([run.loads[i] for run in runs], row_bytes, link, memory)
            for i in range(len(runs[0].loads))
        ]
        return _Yardstick(copy_gbps=memory, link_gbps=link, floors=mean_floors(floors))
    gbps = copy_gbps("cpu", config.num_ranks, copy_s)
    num_tokens = config.num_tokens * config.num_ranks
    ms = floor_ms(num_tokens, sum(run.num_rows for run in runs), row_bytes, gbps)
    one_way = Floor(ms=ms, link_ms=0.0, memory_ms=ms)
    floors_by_op = {"dispatch": one_way, "combine": one_way, "total": one_way + one_way}
    return _Yardstick(copy_gbps=gbps, link_gbps=None, floors=floors_by_op)


def _gpu_facts(yardstick: _Yardstick, floor: Floor) -> dict[str, Any]:
    if yardstick.link_gbps is None:
        return {}
    return {
        "link_gbps": _rounded(yardstick.link_gbps),
        "floor_link_ms": _rounded(floor.link_ms),
        "floor_memory_ms": _rounded(floor.memory_ms),
        "software": gpu_software(),
    }


def write_jsonl(measurements: Sequence[Measurement], path: Path) -> None:
    """Append one JSON object a measurement; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for measurement in measurements:
            file.write(json.dumps(asdict(measurement)) + "\n")


def read_jsonl(path: Path) -> list[Measurement]:
    """The measurements that `write_jsonl` wrote.

    Raises:
        ValueError: a line is no measurement.
    """
    measurements = []
    names = {each.name for each in fields(Measurement)}
    # Records of CPUs are older than what GPUs need.
    needed = {
        each.name
        for each in fields(Measurement)
        if each.default is MISSING and each.default_factory is MISSING
    }
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not needed <= set(record) <= names:
            raise ValueError(f"{path}, line {number}, is no measurement of this version")
        measurements.append(Measurement(**record))
    return measurements


def _group_ms(runs: Sequence[RankRun], entrant: Entrant) -> dict[str, NDArray[np.float64]]:
    ms = {
        op: 1e3 * _group_seconds(runs, [run.spans[entrant][op] for run in runs])
        for op in runs[0].spans[entrant]
    }
    if "dispatch" in ms and "total" not in ms:
        ms["total"] = ms["dispatch"] + ms["combine"]
    return ms


def _group_seconds(runs: Sequence[RankRun], spans: Sequence[Sequence[Span]]) -> NDArray[np.float64]:
    """How long each iteration took the group, from spans by rank and iteration.

    On one host that is from the first beginning to the last end: where ranks share cores, one may
    leave the barrier when another is done already, and its own time would not show that. Clocks of
    several hosts cannot be compared, so there it is the longest rank's own time.
    """
    begin, end = np.moveaxis(np.asarray(spans), 2, 0)
    if len({run.host for run in runs}) == 1:
        return np.asarray(end.max(axis=0) - begin.min(axis=0))
    return np.asarray((end - begin).max(axis=0))


def _wire_bytes(run: RankRun, entrant: Entrant, op: str) -> float:
    by_op = run.wire_bytes[entrant]
    both = by_op["dispatch"] + by_op["combine"]
    return {**by_op, "total": both, "forward_backward": 2 * both}[op]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
