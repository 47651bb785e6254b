"""Measure fusco between the hosts of a test cluster, beside all_to_all over the same links.

    python benchmarks/between_hosts.py benchmarks/results/two_level.jsonl patterns
    python benchmarks/between_hosts.py benchmarks/results/two_level.jsonl hosts ablation

Linux, root, ip and tc. Links have 400 Mbit/s, and with eight hosts 200 Mbit/s, so that all together
stay within what two cores can push.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fusco.bench import BenchConfig, print_report, run_bench, write_jsonl
from fusco.bench.config import PLAIN_BASELINE

FOUR_HOSTS = BenchConfig(
    num_ranks=8, num_hosts=4, nic="400mbit", iterations=10, warmup=2, baselines=(PLAIN_BASELINE,)
)
PATTERNS = ("uniform", "single-node", "imbalanced")
PARTS = {
    "patterns": [replace(FOUR_HOSTS, pattern=pattern) for pattern in PATTERNS],
    "hosts": [
        replace(FOUR_HOSTS, num_ranks=4, num_hosts=2),
        replace(FOUR_HOSTS, num_ranks=16, num_hosts=8, nic="200mbit", iterations=5),
    ],
    "ablation": [
        replace(FOUR_HOSTS, pattern=pattern, ablation=ablation, iterations=6)
        for ablation in ("planner", "balancer")
        for pattern in PATTERNS
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("parts", nargs="*", choices=tuple(PARTS), default=["patterns"])
    arguments = parser.parse_args()
    for part in arguments.parts:
        for config in PARTS[part]:
            measurements = run_bench(config)
            print_report(measurements)
            write_jsonl(measurements, arguments.output)


if __name__ == "__main__":
    main()
