"""From what every rank measured to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusco.bench.clock import Span
from fusco.bench.config import BenchConfig
from fusco.bench.floor import Floor, floor_ms, gpu_floors, mean_floors
from fusco.bench.meters import copy_gbps, link_gbps
from fusco.bench.network import network_facts
from fusco.bench.records import Entrant, Measurement, RankRun
from fusco.machine import circumstances

_BASELINE_MODES = {
    "eager": "eager",
    "static eager": "eager",
    "queued": "queued",
    "static": "queued",
    "graph": "queued",
}
"""In which mode of a baseline a mode is compared with it; others with the main one."""


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

    def reference_ms(entrant: Entrant, op: str) -> float | None:
        if baseline is None:
            return None
        mode = _BASELINE_MODES.get(entrant.mode, config.main_mode)
        return p50.get((replace(baseline, mode=mode), op))

    def measurement(entrant: Entrant, op: str) -> Measurement:
        ms = times[entrant][op]
        reference = reference_ms(entrant, op)
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
            ablation=entrant.ablation,
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
            device=config.device,
            mode=entrant.mode,
            num_sms=entrant.num_sms,
            permutes=entrant.permutes,
            head_start_ms=_rounded(first.head_start_ms.get(entrant.mode, 0.0)),
            left_out=first.left_out,
            network=_network(config, runs, entrant, op, p50[entrant, op]),
            **_gpu_facts(yardstick, floor),
            **circumstances(config.device),
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


def _network(
    config: BenchConfig, runs: Sequence[RankRun], entrant: Entrant, op: str, p50_ms: float
) -> dict[str, Any]:
    uses = [run.links[entrant] for run in runs if entrant in run.links]
    if not uses:
        return {}
    if op == "total":
        return network_facts(config, [use["dispatch"] + use["combine"] for use in uses], p50_ms)
    return network_facts(config, [use[op] for use in uses], p50_ms)


def _gpu_facts(yardstick: _Yardstick, floor: Floor) -> dict[str, Any]:
    if yardstick.link_gbps is None:
        return {}
    return {
        "link_gbps": _rounded(yardstick.link_gbps),
        "floor_link_ms": _rounded(floor.link_ms),
        "floor_memory_ms": _rounded(floor.memory_ms),
    }


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
