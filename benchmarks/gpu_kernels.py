"""Where the time on GPUs goes: when each kernel begins, and how long it runs.

    PYTHONPATH=src python3 benchmarks/gpu_kernels.py --output FILE

By torch's profiler, of dispatch and combine, and of both with their backwards. Needs torch with
CUDA, cuda-core and numpy, and a GPU a rank.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from fusco.bench import BenchConfig
from fusco.bench.batches import Batch, make_batches
from fusco.bench.config import NCCL_BASELINE
from fusco.bench.contenders import Contender, Fusco, make_shuffle
from fusco.bench.place import find_place
from fusco.bench.race import forward_backward
from fusco.machine import append_jsonl, circumstances, num_cores
from fusco.testing.ranks import RankPool

KERNELS = ("plan", "dispatch", "combine")
"""Of the engine `cuda`; what else runs, little beside them, is left out."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is measured: `mode` is "eager" or "queued", as in `fusco bench`."""

    num_tokens: int
    mode: str
    backward: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """A kernel, microseconds from when all ranks may begin."""

    kernel: str
    begin_us: float
    duration_us: float


LOADS = (
    Load(num_tokens=8192, mode="queued"),
    Load(num_tokens=8192, mode="queued", backward=True),
    Load(num_tokens=4096, mode="queued"),
    Load(num_tokens=128, mode="queued"),
    Load(num_tokens=128, mode="eager"),
)


def measure(rank: int, config: BenchConfig, load: Load) -> list[list[Run]]:
    """The kernels of each iteration on one rank; collective."""
    del rank
    place = find_place(config)
    with make_shuffle(config) as shuffle:
        batches = make_batches(config, shuffle.topology, None, place.device)
        contender = Fusco(shuffle)
        call = forward_backward if load.backward else _pair

        def run(number: int) -> None:
            for i in range(number):
                place.clocks[load.mode].time(call, contender, batches[i % len(batches)])

        run(config.warmup)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            run(config.iterations)
    found = iterations(
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not any(found):
        raise RuntimeError("torch's profiler saw no kernel of fusco; is CUPTI there?")
    return found


def iterations(kernels: Iterable[tuple[str, float, float]]) -> list[list[Run]]:
    """What ran after each barrier of the devices.

    Args:
        kernels: name, begin and end of everything that ran, in any order, microseconds.
    """
    found: list[list[Run]] = []
    origin = 0.0
    for name, begin, end in sorted(kernels, key=lambda each: each[1]):
        if "barrier" in name:
            origin = end
            found.append([])
        elif name in KERNELS and found:
            found[-1].append(Run(kernel=name, begin_us=begin - origin, duration_us=end - begin))
    return found


def records(
    load: Load, ranks: list[list[list[Run]]], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """One for each kernel of each rank: medians over the iterations that had all kernels."""
    found = []
    for rank, found_there in enumerate(ranks):
        usual = max(len(runs) for runs in found_there)
        whole = [runs for runs in found_there if len(runs) == usual]
        for number, runs in enumerate(zip(*whole, strict=True)):
            found.append(
                {
                    **asdict(load),
                    "rank": rank,
                    "number": number,
                    "kernel": runs[0].kernel,
                    "begin_us": _median(run.begin_us for run in runs),
                    "p50_us": _median(run.duration_us for run in runs),
                    "min_us": round(min(run.duration_us for run in runs), 1),
                    "iterations": len(runs),
                    **facts,
                }
            )
    return found


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--num-experts", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each load")
    parser.add_argument("--output", type=Path, help="append the records here, as JSON lines")
    parser.add_argument("--commit", help="what the records say instead of what git says here")
    settings = vars(parser.parse_args())
    seconds, output, commit = (settings.pop(name) for name in ("seconds", "output", "commit"))
    config = BenchConfig(**settings, warmup=10, device="cuda", baselines=(NCCL_BASELINE,))
    if torch.cuda.device_count() < config.num_ranks:
        parser.error(f"torch finds {torch.cuda.device_count()} GPUs, this needs {config.num_ranks}")
    facts = {**settings, **circumstances("cuda", commit)}
    with RankPool(
        config.num_ranks,
        device="cuda",
        timeout_s=seconds,
        threads_per_rank=max(1, num_cores() // config.num_ranks),
    ) as pool:
        for load in LOADS:
            ranks = pool.run(measure, replace(config, num_tokens=load.num_tokens), load)
            found = records(load, ranks, facts)
            print(f"{load.num_tokens} tokens, {load.mode}{', backward' if load.backward else ''}")
            lines = defaultdict(str)
            for each in found:
                lines[each["number"]] += f"  {each['begin_us']:8.1f} + {each['p50_us']:6.1f} us"
            for each in found[: len(lines)]:
                print(f"  {each['kernel']:<9}{lines[each['number']]}")
            if output is not None:
                append_jsonl(output, found)
    return 0


def _pair(contender: Contender, batch: Batch) -> None:
    d = contender.dispatch(*batch.arguments)
    contender.combine(d.tokens, d)


def _median(values: Iterable[float]) -> float:
    return round(float(np.median(list(values))), 1)


if __name__ == "__main__":
    sys.exit(main())
