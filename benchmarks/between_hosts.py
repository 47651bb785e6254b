"""Measure fusco between the hosts of a test cluster, beside all_to_all over the same links.

    python benchmarks/between_hosts.py benchmarks/results/two_level.jsonl patterns hosts ablation
    python benchmarks/between_hosts.py benchmarks/results/two_level.jsonl patterns --trace FILE.npz

With a trace its routing is measured instead of those drawn. Linux, root, ip and tc. Links have 400
Mbit/s, and with eight hosts 200 Mbit/s, so that all together stay within what two cores can push.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fusco.bench import BenchConfig, print_report, run_bench, write_jsonl
from fusco.bench.config import PLAIN_BASELINE
from fusco.bench.trace import load_trace

FOUR_HOSTS = BenchConfig(
    num_ranks=8, num_hosts=4, nic="400mbit", iterations=10, warmup=2, baselines=(PLAIN_BASELINE,)
)
DRAWN = ("uniform", "single-node", "imbalanced")
PARTS = {
    "patterns": (FOUR_HOSTS,),
    "hosts": (
        replace(FOUR_HOSTS, num_ranks=4, num_hosts=2),
        replace(FOUR_HOSTS, num_ranks=16, num_hosts=8, nic="200mbit", iterations=5),
    ),
    "ablation": (replace(FOUR_HOSTS, ablation="each", iterations=8),),
}


def with_routings(part: str, trace: Path | None) -> list[BenchConfig]:
    """The configurations of a part: growth is shown with uniform routing alone."""
    if trace is None:
        patterns = DRAWN if part != "hosts" else DRAWN[:1]
        return [replace(each, pattern=pattern) for pattern in patterns for each in PARTS[part]]
    recorded = load_trace(trace)
    changes = {"num_experts": recorded.num_experts, "top_k": recorded.top_k}
    return [replace(each, pattern="trace", trace=trace, **changes) for each in PARTS[part]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("parts", nargs="*", choices=tuple(PARTS), default=["patterns"])
    parser.add_argument("--trace", type=Path)
    arguments = parser.parse_args()
    for part in arguments.parts:
        for config in with_routings(part, arguments.trace):
            measurements = run_bench(config)
            print_report(measurements)
            write_jsonl(measurements, arguments.output)


if __name__ == "__main__":
    main()
