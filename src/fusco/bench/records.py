"""A measurement and the facts that go with it, as one JSON object a line."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fusco
from fusco.bench.config import BASELINES, BenchConfig
from fusco.bench.floor import copy_gbps, floor_ms

OPS = ("dispatch", "combine", "total")

Span = tuple[float, float]
"""When one rank began something and when it was done, in seconds of its host's clock."""


@dataclass(frozen=True, kw_only=True)
class RankRun:
    """What one rank measured; `spans` by engine and operation, an entry an iteration."""

    engine: str
    host: str
    num_nodes: int
    num_threads: int
    spans: dict[str, dict[str, list[Span]]]
    copy_spans: list[Span]
    wire_bytes: dict[str, dict[str, float]]
    num_rows: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One operation of one engine. What is not described here is as in `BenchConfig`.

    Attributes:
        op: dispatch, combine, or total, which is both.
        engine: fusco's engine, or a baseline.
        num_tokens: tokens of each rank.
        p50_ms: median over iterations, until the slowest rank is done; p10_ms and p90_ms likewise.
        wire_bytes: bytes that cross from rank to rank, all ranks together, mean of an iteration.
        copy_gbps: median copy bandwidth of all ranks together, read plus written.
        floor_ms: see `fusco.bench.floor`.
        ratio_to_baseline: the first baseline's p50 over this one's: above 1 is faster than it.
        load_imbalance: mean rows of the busiest rank over those of all.
        num_threads: threads of each rank.
        hardware: cpu, cores and memory_gib of the machine of rank 0.
        commit: of the sources that ran, with "-dirty" if they were changed; None if unknown.
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
    ratio_to_baseline: float
    load_imbalance: float
    seed: int
    iterations: int
    num_threads: int
    hardware: dict[str, Any]
    torch: str
    python: str
    fusco: str
    commit: str | None

    @property
    def is_baseline(self) -> bool:
        """Whether this is not fusco but what it is compared with."""
        return self.engine in BASELINES

    @property
    def floor_fraction(self) -> float:
        """The floor over the time: 1 would be as fast as memory allows."""
        return self.floor_ms / self.p50_ms


def summarise(config: BenchConfig, runs: Sequence[RankRun]) -> list[Measurement]:
    """From what every rank measured to one measurement an engine and operation."""
    first = runs[0]
    num_rows = [run.num_rows for run in runs]
    copy_s = np.median(_group_seconds(runs, [run.copy_spans for run in runs]))
    gbps = copy_gbps(config.num_ranks, float(copy_s))
    one_way_ms = floor_ms(
        config.num_tokens * config.num_ranks,
        sum(num_rows),
        config.hidden_size * config.torch_dtype.itemsize,
        gbps,
    )
    times = {engine: _group_ms(runs, engine) for engine in first.spans}
    p50 = {
        (engine, op): float(np.median(ms)) for engine in times for op, ms in times[engine].items()
    }
    return [
        Measurement(
            op=op,
            engine=engine,
            pattern=config.pattern,
            num_ranks=config.num_ranks,
            num_nodes=first.num_nodes,
            num_tokens=config.num_tokens,
            hidden_size=config.hidden_size,
            top_k=config.top_k,
            num_experts=config.num_experts,
            dtype=config.dtype,
            ablation=config.ablation,
            p50_ms=_rounded(p50[engine, op]),
            p10_ms=_rounded(np.percentile(times[engine][op], 10)),
            p90_ms=_rounded(np.percentile(times[engine][op], 90)),
            wire_bytes=round(sum(_wire_bytes(run, engine, op) for run in runs)),
            copy_gbps=_rounded(gbps),
            floor_ms=_rounded(one_way_ms * (2 if op == "total" else 1)),
            ratio_to_baseline=_rounded(p50[config.baselines[0], op] / p50[engine, op]),
            load_imbalance=_rounded(max(num_rows) / max(sum(num_rows) / len(num_rows), 1.0)),
            seed=config.seed,
            iterations=config.iterations,
            num_threads=first.num_threads,
            hardware=hardware(),
            torch=torch.__version__,
            python=platform.python_version(),
            fusco=fusco.__version__,
            commit=source_commit(),
        )
        for engine in times
        for op in OPS
    ]


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
    names = {field.name for field in fields(Measurement)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or set(record) != names:
            raise ValueError(f"{path}, line {number}, is no measurement of this version")
        measurements.append(Measurement(**record))
    return measurements


@functools.cache
def hardware() -> dict[str, Any]:
    """What this machine is: processor, usable cores and memory."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "memory_gib": round(memory_bytes / 2**30, 1),
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def source_commit() -> str | None:
    """The git commit of the fusco that runs; None where it does not run from a checkout."""
    source = Path(fusco.__file__)
    if not _git(source, "ls-files", source.name):
        return None
    return _git(source, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(source: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(source.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _group_ms(runs: Sequence[RankRun], engine: str) -> dict[str, NDArray[np.float64]]:
    ms = {op: 1e3 * _group_seconds(runs, [run.spans[engine][op] for run in runs]) for op in OPS[:2]}
    return ms | {"total": ms["dispatch"] + ms["combine"]}


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


def _wire_bytes(run: RankRun, engine: str, op: str) -> float:
    by_op = run.wire_bytes[engine]
    return sum(by_op.values()) if op == "total" else by_op[op]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
