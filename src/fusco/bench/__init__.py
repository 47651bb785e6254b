"""The benchmark: dispatch and combine beside plain torch.distributed and the floor of the machine.

measurements = run_bench(BenchConfig(num_ranks=4, pattern="zipf"))
print_report(measurements)
"""

from fusco.bench.config import BASELINES, DTYPES, PATTERNS, SWITCHES, BenchConfig
from fusco.bench.measure import run_bench
from fusco.bench.patterns import RoutingSet
from fusco.bench.plot import plot_measurements
from fusco.bench.records import Measurement, read_jsonl, write_jsonl
from fusco.bench.report import print_comparison, print_report

__all__ = [
    "BASELINES",
    "DTYPES",
    "PATTERNS",
    "SWITCHES",
    "BenchConfig",
    "Measurement",
    "RoutingSet",
    "plot_measurements",
    "print_comparison",
    "print_report",
    "read_jsonl",
    "run_bench",
    "write_jsonl",
]
