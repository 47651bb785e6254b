"""How much memory a rank needs beside its tensors and windows.

    python benchmarks/memory.py --output benchmarks/results/memory.jsonl

Four ranks dispatch and combine 1,024 tokens of 2,048 bfloat16 elements, top-8 of 64 experts, with
changing routing. A rank's peak growth after set-up, in PSS as the kernel counts it, must be at most
its inputs, outputs and window plus 64 MiB. Prints one JSON object a rank.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from soak import pss_bytes

import fusco
from fusco.machine import circumstances
from fusco.testing.ranks import RankPool

NUM_TOKENS, HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 1024, 2048, 8, 64
NUM_RANKS, NUM_ITERATIONS = 4, 50
ALLOWANCE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Peak:
    """One rank, in bytes. Expert outputs are an input, in ordinary memory of the rank."""

    rank: int
    peak_growth_bytes: int
    input_bytes: int
    output_bytes: int
    window_bytes: int

    @property
    def bound_bytes(self) -> int:
        return self.input_bytes + self.output_bytes + self.window_bytes + ALLOWANCE_BYTES


def measure(rank: int) -> Peak:
    """The growth from the finished set-up to the fullest moment, looked for after each call."""
    generator = torch.Generator().manual_seed(rank)
    with fusco.Shuffle(
        num_experts=NUM_EXPERTS, hidden_size=HIDDEN_SIZE, top_k=TOP_K, max_tokens=NUM_TOKENS
    ) as shuffle:
        before = now()
        x = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator).bfloat16()
        # Kept: what malloc does with a freed one of this size is not fusco's to answer for.
        memory = torch.zeros(int(1.1 * NUM_TOKENS * TOP_K), HIDDEN_SIZE, dtype=torch.bfloat16)
        peak = inputs = outputs = 0
        for _ in range(NUM_ITERATIONS):
            scores = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator)
            weights, idx = scores.topk(TOP_K)
            d = shuffle.dispatch(x, idx, weights)
            peak = max(peak, now())
            rows = torch.mul(d.tokens, 0.5, out=memory[: len(d.tokens)])
            y = shuffle.combine(rows, d)
            peak = max(peak, now())
            inputs = sum(each.nbytes for each in (x, memory, scores, weights, idx))
            outputs = y.nbytes
            del d, rows, y
        return Peak(
            rank=rank,
            peak_growth_bytes=peak - before,
            input_bytes=inputs,
            output_bytes=outputs,
            window_bytes=shuffle.stats().window_bytes,
        )


def now() -> int:
    """This rank's PSS while no other touches what they share."""
    dist.barrier()
    held = pss_bytes()
    dist.barrier()
    return held


def main() -> int:
    """Measure, print, judge, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the objects here, as JSON lines")
    arguments = parser.parse_args()
    with RankPool(NUM_RANKS) as pool:
        peaks: list[Peak] = pool.run(measure)
    facts = circumstances()
    lines = [json.dumps({**asdict(p), "bound_bytes": p.bound_bytes, **facts}) for p in peaks]
    print("\n".join(lines))
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n")
    return int(any(peak.peak_growth_bytes > peak.bound_bytes for peak in peaks))


if __name__ == "__main__":
    sys.exit(main())
