"""Ten thousand training-like steps with changing routing: does a rank's memory grow?

    python benchmarks/soak.py --iterations 10000

Each step dispatches, combines and goes backward with another routing and another number of tokens.
A rank's memory is its PSS, private pages plus its share of the shared ones, as the kernel counts
it. Prints one JSON object a sample, and fails if the second half of the run grew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import fusco
from fusco.testing.ranks import RankPool

NUM_SAMPLES = 20
ALLOWED_GROWTH_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Load:
    """The steps to run."""

    engine: str
    iterations: int
    max_tokens: int = 256
    hidden_size: int = 512
    top_k: int = 4
    num_experts: int = 32


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One rank's memory after `iteration` steps, in bytes, and the steps' mean time so far."""

    rank: int
    iteration: int
    pss_bytes: int
    window_bytes: int
    step_ms: float


def pss_bytes() -> int:
    """Proportional set size of this process, in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no Pss line; this needs Linux 4.14 or later")


def soak(rank: int, load: Load) -> list[Sample]:
    """All steps on one rank; a sample after every twentieth of them."""
    generator = torch.Generator().manual_seed(rank)
    samples = []
    with fusco.Shuffle(
        num_experts=load.num_experts,
        hidden_size=load.hidden_size,
        top_k=load.top_k,
        max_tokens=load.max_tokens,
        dtype=torch.bfloat16,
        engine=load.engine,
    ) as shuffle:
        started = time.perf_counter()
        for iteration in range(1, load.iterations + 1):
            num_tokens = int(torch.randint(load.max_tokens + 1, (), generator=generator))
            shape = (num_tokens, load.top_k)
            x = torch.randn(num_tokens, load.hidden_size, generator=generator).bfloat16()
            idx = torch.randint(-1, load.num_experts, shape, generator=generator)
            weights = torch.rand(shape, generator=generator)
            d = shuffle.dispatch(x.requires_grad_(), idx, weights.requires_grad_())
            assert isinstance(d.tokens, torch.Tensor)
            y = shuffle.combine(d.tokens * 2, d)
            assert isinstance(y, torch.Tensor)
            y.float().square().sum().backward()
            if iteration % max(1, load.iterations // NUM_SAMPLES) == 0:
                dist.barrier()  # shared pages are counted while nobody maps new ones
                samples.append(
                    Sample(
                        rank=rank,
                        iteration=iteration,
                        pss_bytes=pss_bytes(),
                        window_bytes=shuffle.stats().window_bytes,
                        step_ms=(time.perf_counter() - started) * 1e3 / iteration,
                    )
                )
                dist.barrier()
    return samples


def main() -> int:
    """Run, print, and judge the second half."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--num-ranks", type=int, default=4)
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()
    load = Load(engine=arguments.engine, iterations=arguments.iterations)
    with RankPool(arguments.num_ranks, timeout_s=3600.0) as pool:
        by_rank = pool.run(soak, load)
    worst_growth = 0
    for samples in by_rank:
        for sample in samples:
            print(json.dumps(asdict(sample)))
        half = [sample.pss_bytes for sample in samples[len(samples) // 2 :]]
        worst_growth = max(worst_growth, half[-1] - half[0])
    print(json.dumps({"growth_bytes_of_second_half": worst_growth}))
    return int(worst_growth > ALLOWED_GROWTH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
