"""Ten thousand training-like steps with changing routing: does a rank's memory grow?

    python benchmarks/soak.py --output benchmarks/results/soak.jsonl

Each step dispatches, combines and goes backward with another routing and another number of tokens.
A rank's memory is its PSS, private pages plus its share of the shared ones, as the kernel counts
it. Prints a line as each twentieth is done, and fails if a rank grew in the second half.
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
from fusco.machine import circumstances
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
    """All ranks after `iteration` steps: memory of each in bytes, the steps' mean time so far."""

    iteration: int
    pss_bytes: tuple[int, ...]
    window_bytes: tuple[int, ...]
    step_ms: float


def pss_bytes() -> int:
    """Proportional set size of this process, in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no Pss line; this needs Linux 4.14 or later")


def soak(rank: int, load: Load) -> list[Sample]:
    """All steps; a sample of all ranks after every twentieth of them."""
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
                samples.append(sample(shuffle, iteration, started))
                if rank == 0:
                    print(json.dumps(asdict(samples[-1])), flush=True)
    return samples


def sample(shuffle: fusco.Shuffle, iteration: int, started: float) -> Sample:
    """What all ranks hold now; collective."""
    step_ms = (time.perf_counter() - started) * 1e3 / iteration
    dist.barrier()  # shared pages are counted while nobody maps new ones
    mine = pss_bytes(), shuffle.stats().window_bytes
    held: list[tuple[int, int]] = [mine] * dist.get_world_size()
    dist.all_gather_object(held, mine)
    pss, windows = zip(*held, strict=True)
    return Sample(iteration=iteration, pss_bytes=pss, window_bytes=windows, step_ms=step_ms)


def growth_bytes(samples: list[Sample]) -> int:
    """The most that a rank grew in the second half."""
    half = samples[len(samples) // 2 :]
    ends = zip(half[0].pss_bytes, half[-1].pss_bytes, strict=True)
    return max(last - first for first, last in ends)


def main() -> int:
    """Run, judge the second half, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--num-ranks", type=int, default=4)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--output", type=Path, help="write the samples here, as JSON lines")
    arguments = parser.parse_args()
    load = Load(engine=arguments.engine, iterations=arguments.iterations)
    with RankPool(arguments.num_ranks, timeout_s=3600.0) as pool:
        samples = pool.run(soak, load)[0]
    growth = growth_bytes(samples)
    verdict = {
        "growth_bytes_of_second_half": growth,
        "load": asdict(load),
        "num_ranks": arguments.num_ranks,
        **circumstances(),
    }
    print(json.dumps(verdict))
    if arguments.output is not None:
        lines = [json.dumps(each) for each in (*map(asdict, samples), verdict)]
        arguments.output.write_text("\n".join(lines) + "\n")
    return int(growth > ALLOWED_GROWTH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
