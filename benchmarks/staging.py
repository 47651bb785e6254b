"""Does the memory of a rank between hosts grow with the message?

    python benchmarks/staging.py benchmarks/results/staging.jsonl

Two hosts of two ranks, links of 4 Gbit/s, rows of 1,024 bfloat16, top-2 of 16 experts, and one
Shuffle for 1 to 32,768 tokens. For each number it says how large the staging memory is, how much
ordinary memory a rank took meanwhile at the most, outputs not counted, and how much of that is the
plan; once more with fusion off, where whole messages are copied. Rows land in the window, which is
shared memory. Fails if the staging memory changes. Linux, root, ip and tc.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import fusco
from fusco.engines.base import ENGINES
from fusco.engines.two_level import TwoLevelEngine
from fusco.machine import circumstances
from fusco.testing.cluster import Cluster
from fusco.testing.ranks import RankPool

NUM_TOKENS = (1, 64, 1024, 8192, 32768)
HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 1024, 2, 16
LOOK_EVERY_S = 0.001


@dataclass(frozen=True, kw_only=True)
class Need:
    """Of one rank, in bytes; `num_tokens` are of each rank."""

    num_tokens: int
    fusion: bool
    row_bytes: int
    staging_bytes: int
    plan_bytes: int
    dispatch_bytes: int
    combine_bytes: int


def measure(rank: int, fusion: bool) -> list[Need]:
    generator = torch.Generator().manual_seed(rank)
    needs = []
    with fusco.Shuffle(
        num_experts=NUM_EXPERTS,
        hidden_size=HIDDEN_SIZE,
        top_k=TOP_K,
        max_tokens=max(NUM_TOKENS),
        ablation=fusco.Ablation(fusion=fusion),
    ) as shuffle:
        engine = ENGINES[shuffle._key]
        assert isinstance(engine, TwoLevelEngine)
        # The ring is touched whole, and compiled loops are loaded, before anything counts.
        for num_tokens in (max(NUM_TOKENS), *NUM_TOKENS):
            needs.append(trip(shuffle, num_tokens, generator, fusion, engine.staging_bytes))
    return needs[1:]


def trip(
    shuffle: fusco.Shuffle, num_tokens: int, generator: torch.Generator, fusion: bool, staging: int
) -> Need:
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).bfloat16()
    weights, topk_idx = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K)
    with peak_growth() as dispatch_bytes:
        d = shuffle.dispatch(x, topk_idx, weights)
    assert isinstance(d.tokens, torch.Tensor)
    rows = d.tokens.clone()
    with peak_growth() as combine_bytes:
        y = shuffle.combine(rows, d)
    output = 0 if fusion else d.tokens.nbytes
    return Need(
        num_tokens=num_tokens,
        fusion=fusion,
        row_bytes=x.nbytes,
        staging_bytes=staging,
        plan_bytes=sum(each.nbytes for each in d.plan.to_tensors()),
        dispatch_bytes=dispatch_bytes() - output,
        combine_bytes=combine_bytes() - y.nbytes,
    )


@contextmanager
def peak_growth() -> Iterator[Callable[[], int]]:
    """How much this process's own memory grows at the most, looked for all the time."""
    # What malloc keeps of freed memory would hide what is taken now.
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    before = peak = private_bytes()
    done = threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(LOOK_EVERY_S):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield lambda: max(peak - before, 0)
    finally:
        peak = max(peak, private_bytes())
        done.set()
        watcher.join()


def private_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def main() -> int:
    facts = circumstances()
    lines, staging = [], set()
    with Cluster((2, 2), rate="4gbit") as cluster, RankPool(4, seats=cluster.seats) as pool:
        for fusion in (True, False):
            for needs in zip(*pool.run(measure, fusion), strict=True):
                staging |= {each.staging_bytes for each in needs}
                most = max(needs, key=lambda each: each.dispatch_bytes + each.combine_bytes)
                lines.append(json.dumps({**asdict(most), **facts}))
                print(
                    f"{most.num_tokens:6} tokens, {'fused' if fusion else 'not fused'}, MiB: rows "
                    f"{most.row_bytes / 2**20:.2f}, staging {most.staging_bytes / 2**20:.2f}, plan "
                    f"{most.plan_bytes / 2**20:.2f}, at most in dispatch "
                    f"{most.dispatch_bytes / 2**20:.2f}, in combine "
                    f"{most.combine_bytes / 2**20:.2f}"
                )
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
    return int(len(staging) > 1)


if __name__ == "__main__":
    sys.exit(main())
