"""Random dispatches and combines between hosts, each compared to the last bit; does anything break?

    python benchmarks/soak_between_hosts.py benchmarks/results/soak_between_hosts.json

Every iteration draws other numbers of tokens and another routing on a test cluster of three uneven
hosts, of two, two and one ranks; every sixteenth makes a new Shuffle of another shape. A few of the
packets are lost on one link. Linux, root, ip and tc.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fusco.machine import circumstances
from fusco.testing.cases import Case, Routing, draw, expect_round_trip
from fusco.testing.cluster import Cluster
from fusco.testing.ranks import RankPool

HOSTS = (2, 2, 1)
MAX_TOKENS = 200
SHAPES = 16
ROUTINGS: tuple[Routing, ...] = ("uniform", "repeated", "holes", "one-expert")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def run(rank: int, first: int, iterations: int) -> int:
    """Iterations from `first` on with one Shuffle; raises if a bit differs."""
    shape = np.random.default_rng(first)
    case = Case(
        num_tokens=(0,) * sum(HOSTS),
        hidden_size=int(shape.integers(1, 700)),
        top_k=int(shape.integers(1, 9)),
        num_experts=5 * int(shape.integers(2, 9)),
        dtype=DTYPES[shape.integers(len(DTYPES))],
        expert_alignment=int(shape.choice((1, 1, 16))),
        ranks_per_node=2,
    )
    with case.shuffle(None, "two_level", max_tokens=MAX_TOKENS) as shuffle:
        for number in range(first, first + iterations):
            each = np.random.default_rng([first, number])
            drawn = replace(
                case,
                num_tokens=tuple(each.integers(0, MAX_TOKENS + 1, len(case.num_tokens)).tolist()),
                routing=ROUTINGS[each.integers(len(ROUTINGS))],
                seed=number,
            )
            expect_round_trip(shuffle, draw(drawn), rank)
    return iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--iterations", type=int, default=1000)
    arguments = parser.parse_args()
    began, done = time.monotonic(), 0
    with (
        Cluster(HOSTS, rate="400mbit") as cluster,
        RankPool(sum(HOSTS), seats=cluster.seats) as pool,
    ):
        cluster.lose(1, 0.002)
        while done < arguments.iterations:
            done += pool.run(run, done, min(SHAPES, arguments.iterations - done))[0]
    record = {
        "hosts": HOSTS,
        "iterations": done,
        "differences": 0,
        "seconds": round(time.monotonic() - began, 1),
        **circumstances(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
