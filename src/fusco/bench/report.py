"""Measurements for the terminal: what was measured, the table, and where fusco loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusco.bench.ablation import ablation_table
from fusco.bench.config import KEPT_BASELINE
from fusco.bench.records import OPS, Measurement

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FLOOR_TARGET = 2.0
SHORT_OPS = {"forward_backward": "fw + bw"}
COMPARED_BY = (
    "op",
    "engine",
    "pattern",
    "num_ranks",
    "num_nodes",
    "num_tokens",
    "hidden_size",
    "top_k",
    "num_experts",
    "dtype",
    "ablation",
    "device",
    "mode",
    "num_sms",
    "permutes",
)


def print_report(measurements: Sequence[Measurement], console: Console | None = None) -> None:
    """Print the configuration, the table and the verdict of one `run_bench`."""
    from rich.console import Console

    console = console or Console()
    console.print(_configuration(measurements))
    console.print(_table(measurements))
    if (ablation := ablation_table(measurements)) is not None:
        console.print(ablation)
    for line in _verdict(measurements):
        console.print(line)


def print_comparison(
    measurements: Sequence[Measurement],
    record: Sequence[Measurement],
    console: Console | None = None,
) -> bool:
    """Print the measurements beside the last ones of the same configuration in a record; whether
    there are any."""
    from rich.console import Console

    console = console or Console()
    recorded = {_key(old): old for old in record}
    table = _ruled("op", "engine")
    for heading in ("p50 ms", "recorded ms", "recorded / now"):
        table.add_column(heading, justify="right", no_wrap=True)
    other_hardware = False
    for new in measurements:
        old = recorded.get(_key(new))
        if old is None:
            table.add_row(new.op, new.label, _ms(new.p50_ms), "none", "")
            continue
        other_hardware |= old.hardware != new.hardware
        ratio = f"{old.p50_ms / new.p50_ms:.2f}x"
        table.add_row(new.op, new.label, _ms(new.p50_ms), _ms(old.p50_ms), ratio)
    console.print(table)
    if other_hardware:
        console.print("The record is from other hardware: compare ratios, not times.")
    return any(_key(new) in recorded for new in measurements)


def _configuration(measurements: Sequence[Measurement]) -> Table:
    from rich.table import Table

    one = measurements[0]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    seen = one.hardware
    gpus = f"{seen['num_gpus']} x {seen['gpu']}, " if "gpu" in seen else ""
    for name, value in (
        ("ranks", f"{one.num_ranks} on {one.num_nodes} node{'s' * (one.num_nodes > 1)}"),
        ("tokens", f"{one.num_tokens} a rank, hidden {one.hidden_size}, {one.dtype}"),
        *([("network", _network(one))] if one.network else []),
        ("experts", f"top-{one.top_k} of {one.num_experts}"),
        ("pattern", f"{one.pattern}, busiest rank {one.load_imbalance:.2f} times the mean"),
        ("switched off", ", ".join(dict.fromkeys(m.ablation for m in measurements))),
        ("iterations", f"{one.iterations}, seed {one.seed}"),
        ("machine", f"{gpus}{seen['cpu']}, {seen['cores']} cores, {seen['memory_gib']} GiB"),
        ("threads", f"{one.num_threads} a rank"),
        ("software", _software(one)),
    ):
        grid.add_row(name, value)
    return grid


def _network(one: Measurement) -> str:
    return f"{one.network['hosts']} hosts, a link of {one.network['nic']} a rank"


def _software(one: Measurement) -> str:
    versions = {"fusco": one.fusco, "torch": one.torch, "Python": one.python, **one.software}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _table(measurements: Sequence[Measurement]) -> Table:
    table = _ruled("op", "engine")
    for heading in ("p50 ms", "p10", "p90", "MB", "floor", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for op in OPS:
        of_op = [m for m in measurements if m.op == op]
        for m in of_op:
            table.add_row(
                SHORT_OPS.get(m.op, m.op),
                m.label,
                _ms(m.p50_ms),
                _ms(m.p10_ms),
                _ms(m.p90_ms),
                f"{m.wire_bytes / 1e6:.1f}",
                f"{m.floor_fraction:.1%}",
                "" if m.ratio_to_baseline is None else f"{m.ratio_to_baseline:.2f}x",
                style="dim" if m.is_baseline else "bold" if op == "total" else None,
                end_section=m is of_op[-1],
            )
    return table


def _ruled(*headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _verdict(measurements: Sequence[Measurement]) -> list[str]:
    total = next(m for m in measurements if m.op == "total")
    ours = [m for m in measurements if not m.is_baseline]
    baselines = [m for m in measurements if m.is_baseline]
    lines = ["MB: bytes of all ranks that go from rank to rank.", _floor_text(total)]
    if baselines:
        lines.append(f"ratio: the p50 of {baselines[0].engine} over this one.")
    lines += [f"{name}: {reason}." for name, reason in total.left_out.items()]
    if any(m.engine == KEPT_BASELINE for m in baselines):
        lines.append(f"{KEPT_BASELINE}: with buffers kept from call to call, results too.")
    slower = [
        f"[red]{mine.label} loses[/red]: its {mine.op} takes {mine.p50_ms / other.p50_ms:.2f} "
        f"times as long as that of {other.engine}."
        for other in baselines
        for mine in ours
        if (mine.op, mine.mode) == (other.op, other.mode) and mine.p50_ms > other.p50_ms
    ]
    if baselines and not slower:
        slower.append(f"{total.engine} is faster than the baselines in every operation.")
    lines += slower
    lines += [f"{m.label}: {_links(m)}" for m in measurements if m.network and m.op == "total"]
    if total.device == "cuda":
        lines.append(
            "eager: the GPU is idle when the host begins. queued: the host has a head start of "
            f"{max(m.head_start_ms for m in measurements):.1f} ms, as in a running model. static: "
            "with max_recv_tokens, so that it waits for nothing; graph: replayed."
        )
    alike = (total.mode, total.num_sms, total.ablation)
    main = [m for m in ours if (m.mode, m.num_sms, m.ablation) == alike]
    far = [m.op for m in main if m.floor_ms * FLOOR_TARGET < m.p50_ms]
    if far:
        lines.append(
            f"More than {FLOOR_TARGET:.0f} times the floor: {', '.join(far)} of {total.engine}."
        )
    return lines


def _links(total: Measurement) -> str:
    seen = total.network
    text = (
        f"links: the busiest carries {seen['busiest_bytes'] / 1e6:.1f} MB, which takes it "
        f"{seen['link_fraction']:.1%} of the time"
    )
    if not seen["plan_bytes"]:
        return f"{text}."
    more = seen["link_bytes"] / seen["plan_bytes"] - 1
    return f"{text}; all carry {more:.1%} more than the plan."


def _floor_text(total: Measurement) -> str:
    least = f"floor: the least time over this one; for total that is {_ms(total.floor_ms)} ms, "
    if total.link_gbps is None:
        return (
            f"{least}to read and write each row once at the {total.copy_gbps:.1f} GB/s which all "
            "ranks copying at once reached in this run."
        )
    return (
        f"{least}where the links need {_ms(total.floor_link_ms or 0)} ms at {total.link_gbps:.0f} "
        f"GB/s each way, and each GPU's memory {_ms(total.floor_memory_ms or 0)} ms at "
        f"{total.copy_gbps:.0f} GB/s, both as measured in this run."
    )


def _key(measurement: Measurement) -> tuple[object, ...]:
    return tuple(getattr(measurement, name) for name in COMPARED_BY)
