"""Measure fusco between nodes of GPUs, beside NCCL's all_to_all_single over the same sockets.

    PYTHONPATH=src python3 benchmarks/gpu_nodes.py benchmarks/results/gpu_nodes.jsonl

Nodes are emulated on one machine, with one GPU each: ranks with unlike NCCL_HOSTID are joined by
sockets on the loopback. Needs torch with CUDA and numpy, and a GPU a node. What the sockets carry
is measured too, and is what floors mean here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from fusco.bench import BenchConfig, Measurement, run_bench, write_jsonl
from fusco.bench.config import NCCL_BASELINE
from fusco.machine import num_cores
from fusco.testing.nodes import emulated_nodes
from fusco.testing.ranks import RankPool

SOCKET_BYTES = 256 << 20
SOCKET_RUNS = 5


def main() -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="file to append to")
    parser.add_argument("--num-nodes", type=int, default=2)
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=240.0, help="for all of it")
    parser.add_argument("--commit", help="what the records say instead of what git says here")
    arguments = parser.parse_args()
    num_ranks = arguments.num_nodes
    if torch.cuda.device_count() < num_ranks:
        parser.error(f"torch finds {torch.cuda.device_count()} GPUs, this needs {num_ranks}")
    config = BenchConfig(
        num_ranks=num_ranks,
        num_tokens=arguments.num_tokens,
        hidden_size=7168,
        num_experts=256,
        engine="two_level",
        device="cuda",
        iterations=arguments.iterations,
        warmup=2,
        baselines=(NCCL_BASELINE,),
    )
    with RankPool(
        num_ranks,
        device="cuda",
        environments=emulated_nodes(num_ranks, num_ranks),
        timeout_s=arguments.seconds,
        threads_per_rank=max(1, num_cores() // num_ranks),
    ) as pool:
        socket_gbps = min(pool.run(measure_sockets))
        print(f"sockets: {socket_gbps:.2f} GB/s each way, of the slowest rank", flush=True)
        measured = over_sockets(run_bench(config, pool), socket_gbps)
    measured = [replace(each, commit=arguments.commit or each.commit) for each in measured]
    write_jsonl(measured, arguments.output)
    for each in measured:
        ratio = f"  {each.ratio_to_baseline:5.2f}x" if each.ratio_to_baseline else ""
        rank_mb = each.wire_bytes / num_ranks / 1e6
        print(
            f"{each.op:<9} {each.label:<18} p50 {each.p50_ms:7.1f} ms  p10 {each.p10_ms:7.1f}  "
            f"p90 {each.p90_ms:7.1f}  {rank_mb:6.0f} MB a rank = {rank_mb / each.p50_ms:5.2f} GB/s"
            f"  floor {each.floor_ms:6.1f} ({each.floor_fraction:4.0%}){ratio}"
        )
    one = measured[0]
    print(f"{one.hardware}, {one.software}, torch {one.torch}, commit {one.commit}")
    return 0


def measure_sockets(rank: int) -> float:
    """1e9 bytes a second that this rank sends, while it receives as many; the best of a few."""
    num_ranks, device = dist.get_world_size(), torch.device("cuda", torch.cuda.current_device())
    out, got = (torch.zeros(SOCKET_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    dist.all_reduce(torch.zeros(1, device=device))
    best_s = float("inf")
    for _ in range(SOCKET_RUNS):
        torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))
        begin_s = time.perf_counter()
        operations = [
            dist.P2POp(dist.isend, out, (rank + 1) % num_ranks),
            dist.P2POp(dist.irecv, got, (rank - 1) % num_ranks),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - begin_s)
    return SOCKET_BYTES / best_s / 1e9


def over_sockets(measured: Sequence[Measurement], socket_gbps: float) -> list[Measurement]:
    """The same with floors of sockets: what fusco's bytes take there, at the least."""
    mine = {each.op: each for each in measured if not each.is_baseline}
    found = []
    for each in measured:
        rank_bytes = mine[each.op].wire_bytes / each.num_ranks
        link_ms = rank_bytes / socket_gbps / 1e6
        found.append(
            replace(
                each,
                link_gbps=socket_gbps,
                floor_link_ms=link_ms,
                floor_ms=max(link_ms, each.floor_memory_ms or 0.0),
            )
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
