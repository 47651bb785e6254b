"""What each mechanism brings, measured by switching it off, beside FUSCO, Table 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusco.bench.config import MECHANISMS
from fusco.bench.records import Measurement

if TYPE_CHECKING:
    from rich.table import Table

PAPER: dict[str, dict[str, float]] = {
    "trace": {"fusion": 0.273, "planner": 0.302, "balancer": 0.087},
    "single-node": {"fusion": 0.333, "planner": 0.673, "balancer": 0.032},
    "imbalanced": {"fusion": 0.312, "planner": 0.271, "balancer": 0.166},
}
"""Throughput lost, by pattern and mechanism: 64 H100s of 8 nodes, 16k tokens. The trace is that of
another model; uniform routing is not in the paper."""


def degradation(on_ms: float, off_ms: float) -> float:
    """The part of the throughput that is lost where something takes `off_ms` instead of `on_ms`."""
    return 1 - on_ms / off_ms


def ablation_table(measurements: Sequence[Measurement]) -> Table | None:
    """Of dispatch and combine, for each mechanism switched off; None if that was not measured."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    totals = {
        m.ablation: m
        for m in measurements
        if m.op == "total" and not m.is_baseline and not m.num_sms
    }
    if "none" not in totals or len(totals) == 1:
        return None
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("switched off")
    for heading in ("p50 ms", "throughput lost", "in the paper", "bytes between nodes"):
        table.add_column(heading, justify="right")
    whole = totals["none"]
    for name in ("none", *MECHANISMS):
        if (m := totals.get(name)) is None:
            continue
        lost = "" if m is whole else f"{degradation(whole.p50_ms, m.p50_ms):.1%}"
        paper = PAPER.get(m.pattern, {}).get(name)
        crossing = m.network.get("link_bytes")
        table.add_row(
            name,
            f"{m.p50_ms:.0f}",
            lost,
            "" if paper is None else f"{paper:.1%}",
            "" if crossing is None else f"{crossing / 1e6:.1f} MB",
        )
    return table
