"""Every measurement of the CUDA engine, one after the other, on all GPUs of a machine.

    PYTHONPATH=src python3 benchmarks/gpu.py OUTPUT_FOLDER [--trace FILE.npz]

Needs torch with CUDA, cuda-core and numpy; no network, and nothing of the command line. Writes
gpu.jsonl and, where matplotlib is installed, gpu.png. A measurement that fails is reported and the
next one goes on; what does not fit in the time is left out and named.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusco.bench import BASELINES, BenchConfig, Measurement, run_bench, write_jsonl
from fusco.bench.config import NCCL_BASELINE
from fusco.bench.plot import plot_measurements
from fusco.bench.trace import load_trace
from fusco.errors import FuscoError
from fusco.machine import num_cores
from fusco.testing.ranks import RankFailure, RankPool

STEP_S = 90.0
"""Longest one measurement takes."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measurement."""

    name: str
    config: BenchConfig


def steps(num_ranks: int, trace: Path | None) -> Iterator[Step]:
    """What is measured: the important first."""
    model = BenchConfig(
        num_ranks=num_ranks,
        num_tokens=8192,
        hidden_size=7168,
        num_experts=256,
        engine="cuda",
        device="cuda",
        iterations=100,
        warmup=10,
        baselines=BASELINES["cuda"],
    )
    two_nodes: dict[str, Any] = {"ranks_per_node": max(1, num_ranks // 2)}
    yield Step(name="uniform, backward", config=replace(model, backward=True))
    yield Step(name="4,096 tokens, graph", config=replace(model, num_tokens=4096, graph=True))
    yield Step(name="16,384 tokens", config=replace(model, num_tokens=16384))
    small = replace(model, num_tokens=128, iterations=300)
    yield Step(name="128 tokens, graph", config=replace(small, graph=True))
    bounded = replace(model, num_sms=(16, 24, 32, 48, 64, 96), baselines=(NCCL_BASELINE,))
    yield Step(name="num_sms", config=bounded)
    yield Step(name="zipf", config=replace(model, pattern="zipf"))
    yield Step(name="imbalanced", config=replace(model, pattern="imbalanced", **two_nodes))
    yield Step(name="single-node", config=replace(model, pattern="single-node", **two_nodes))
    yield Step(name="hidden 2,048", config=replace(model, hidden_size=2048))
    if trace is not None:
        recorded = load_trace(trace)
        yield Step(
            name="trace",
            config=replace(
                model,
                pattern="trace",
                trace=trace,
                num_experts=recorded.num_experts,
                top_k=recorded.top_k,
            ),
        )


def main() -> int:
    """Measure, write, print, draw; 1 if something failed or was left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for gpu.jsonl and gpu.png")
    parser.add_argument("--trace", type=Path, help="recorded routing to measure with")
    parser.add_argument("--num-ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--seconds", type=float, default=220.0, help="for all measurements")
    parser.add_argument("--only", default="", help="names of steps, or parts of them, by comma")
    parser.add_argument("--commit", help="what the records say instead of what git says here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; run this on a machine with GPUs")
    arguments.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.seconds
    lines, problems, found = [], [], []
    with RankPool(
        arguments.num_ranks,
        device="cuda",
        threads_per_rank=max(1, num_cores() // arguments.num_ranks),
    ) as pool:
        for step in steps(arguments.num_ranks, arguments.trace):
            if not any(part in step.name for part in arguments.only.split(",")):
                continue
            began = time.monotonic()
            if began + STEP_S / 4 > deadline:
                problems.append(f"{step.name}: no time left")
                continue
            pool.timeout_s = min(STEP_S, deadline - began)
            try:
                measured = run_bench(step.config, pool)
            except (FuscoError, RankFailure) as error:
                problems.append(f"{step.name}: {error}")
                print(problems[-1], flush=True)
                continue
            measured = [replace(m, commit=arguments.commit or m.commit) for m in measured]
            write_jsonl(measured, arguments.output / "gpu.jsonl")
            found += measured
            lines.append(f"\n{step.name} ({time.monotonic() - began:.0f} s)")
            lines += table(measured)
            print("\n".join(lines[-len(measured) - 1 :]), flush=True)
    draw(found, arguments.output)
    print("\n=== all ===", machine(found), *lines, *problems, sep="\n")
    return int(bool(problems))


def table(measured: Sequence[Measurement]) -> list[str]:
    """A line a measurement, in plain text."""
    return [
        f"  {m.op:<17} {m.label:<22} p50 {m.p50_ms:7.3f} ms  p10 {m.p10_ms:7.3f}  "
        f"p90 {m.p90_ms:7.3f}  floor {m.floor_ms:6.3f} ({m.floor_fraction:4.0%})"
        + ("" if m.ratio_to_baseline is None else f"  {m.ratio_to_baseline:5.2f}x")
        for m in measured
    ]


def machine(found: Sequence[Measurement]) -> str:
    """What was measured on, and what was not."""
    if not found:
        return "nothing was measured"
    one = found[0]
    permutes = {m.permutes for m in found if m.permutes}
    left_out = [f"{name}: {reason}" for name, reason in one.left_out.items()]
    return "\n".join(
        [
            f"{one.hardware}, {one.software}, torch {one.torch}, commit {one.commit}",
            f"memory {one.copy_gbps:.0f} GB/s, link {one.link_gbps or 0:.0f} GB/s each way, "
            f"permutes of the baselines: {', '.join(sorted(permutes)) or 'none'}",
            f"head start in queued and graph modes {max(m.head_start_ms for m in found):.2f} ms",
            *left_out,
        ]
    )


def draw(found: Sequence[Measurement], folder: Path) -> None:
    """All of it in one picture."""
    try:
        if found:
            plot_measurements(found, folder / "gpu.png")
    except FuscoError as error:
        print(error)


if __name__ == "__main__":
    sys.exit(main())
