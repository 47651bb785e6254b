"""A measurement and the facts that go with it, as one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fusco.bench.clock import Span
from fusco.bench.config import BASELINES
from fusco.bench.floor import Load
from fusco.bench.network import LinkUse
from fusco.machine import append_jsonl

PAIR_OPS = ("dispatch", "combine", "total")
OPS = (*PAIR_OPS, "forward_backward")


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """Who is measured.

    Attributes:
        engine: fusco's engine, or a baseline.
        mode: eager, the device is idle when the host begins; queued, the host has a head start,
            as in a running model; static and static eager, the same two with `max_recv_tokens`;
            graph, static and replayed in a CUDA graph, with a head start; in place, with expert
            outputs in `Shuffle.empty_like`, on GPUs queued. CPUs have no head start.
        num_sms: the most multiprocessors it may take; None: all.
        permutes: what a GPU baseline permutes with: triton or torch.
        ablation: what is switched off, "none" if nothing.
    """

    engine: str
    mode: str = "eager"
    num_sms: int | None = None
    permutes: str | None = None
    ablation: str = "none"


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
        head_start_ms: by mode.
        left_out: by baseline, why it is not measured.
        links: by entrant and operation, the mean use of this rank's link in a test cluster.
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
    head_start_ms: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    links: dict[Entrant, dict[str, LinkUse]] = field(default_factory=dict)


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
            None if no baseline was measured. In the same mode; for graph and in place in the
            main one.
        load_imbalance: mean rows of the busiest rank over those of all.
        num_threads: threads of each rank.
        hardware: cpu, cores and memory_gib of the machine of rank 0, and for GPUs gpu and num_gpus.
        commit: of the sources that ran, with "-dirty" if they were changed; None if unknown.
        head_start_ms: how long the device was kept busy before, while the host launched; it is not
            in the times.
        link_gbps: median bandwidth from a GPU to the next, each way at once.
        floor_link_ms: of the floor, what the links need; floor_memory_ms likewise.
        software: on GPUs the versions of driver, cuda, nccl, triton and deep_ep.
        left_out: by baseline, why it was not measured.
        network: on a test cluster, what `network_facts` says.
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
    head_start_ms: float = 0.0
    link_gbps: float | None = None
    floor_link_ms: float | None = None
    floor_memory_ms: float | None = None
    software: dict[str, str | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)

    @property
    def is_baseline(self) -> bool:
        """Whether this is not fusco but what it is compared with."""
        return self.engine in BASELINES[self.device]

    @property
    def label(self) -> str:
        """The engine, and how it differs from the engine alone."""
        parts = [self.engine]
        if self.ablation != "none":
            parts.append(f"{self.ablation} off")
        if self.num_sms is not None:
            parts.append(f"{self.num_sms} SMs")
        if self.device == "cuda" or self.mode != "eager":
            parts.append(self.mode)
        return " ".join(parts)

    @property
    def floor_fraction(self) -> float:
        """The floor over the time: 1 would be as fast as memory allows."""
        return self.floor_ms / self.p50_ms


def write_jsonl(measurements: Sequence[Measurement], path: Path) -> None:
    """Append one JSON object a measurement; folders on the way are made."""
    append_jsonl(path, map(asdict, measurements))


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
            raise ValueError(
                f"{path}, line {number}, is no measurement of this version; --output makes them"
            )
        measurements.append(Measurement(**record))
    return measurements
