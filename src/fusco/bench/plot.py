"""A plot of measurements: the floor, fusco and the baseline, pattern by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusco.bench.records import PAIR_OPS, Measurement
from fusco.errors import FuscoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR_COLOUR = "#aab2bd"
ENGINE_COLOURS = ("#0b7a75", "#d1603d", "#e0a458")
COMBINE_ALPHA = 0.6
BAR_WIDTH = 0.92


def plot_measurements(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw the times of each pattern as bars and write them to `path` (png, svg or pdf).

    A bar is the p50 of dispatch with the p50 of combine on top; its whisker goes from the p10 to
    the p90 of both together. All measurements are of one configuration but for the pattern; those
    that bound the multiprocessors or are in another mode than the first are left out.

    Raises:
        FuscoError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise FuscoError(
            "plot: matplotlib is not installed; install it: pip install 'fusco[plot]'"
        ) from error

    measurements = [m for m in measurements if m.mode == measurements[0].mode and m.num_sms is None]
    patterns = list(dict.fromkeys(m.pattern for m in measurements))
    engines = list(dict.fromkeys(m.engine for m in measurements))
    by_key = {(m.pattern, m.engine, m.op): m for m in measurements}
    num_bars = 1 + len(engines)
    figure = Figure(figsize=(2.5 + 0.6 * num_bars * len(patterns), 4.8), layout="constrained")
    axes = figure.add_subplot()
    ticks = []
    for place, pattern in enumerate(patterns):
        first = place * (num_bars + 0.7)
        ticks.append(first + (num_bars - 1) / 2)
        _draw_floor(axes, first, by_key[pattern, engines[0], "total"])
        for bar, (engine, colour) in enumerate(zip(engines, ENGINE_COLOURS, strict=False), 1):
            by_op = {op: by_key[pattern, engine, op] for op in PAIR_OPS}
            _draw_bar(axes, first + bar, by_op, colour)
    one = measurements[0]
    axes.set_title(
        f"Dispatch and combine of {one.num_ranks} ranks, {one.num_tokens} tokens a rank,\n"
        f"hidden {one.hidden_size}, {one.dtype}, top-{one.top_k} of {one.num_experts} experts",
        fontsize=10,
    )
    axes.set_ylabel("slowest rank's time, ms")
    axes.set_xticks(ticks, patterns)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e6e9ed")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(color=FLOOR_COLOUR, label="floor: what merely moving the bytes takes"),
        Patch(color="#666666", alpha=COMBINE_ALPHA, label="lighter part: combine"),
    ]
    for engine, colour in zip(engines, ENGINE_COLOURS, strict=False):
        is_ours = not by_key[patterns[0], engine, "total"].is_baseline
        label = f"fusco ({engine}), with ratio" if is_ours else engine
        handles.append(Patch(color=colour, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _draw_floor(axes: Axes, x: float, total: Measurement) -> None:
    axes.bar(x, total.floor_ms, BAR_WIDTH, color=FLOOR_COLOUR)
    _label(axes, x, total.floor_ms, f"{total.floor_ms:.3g}")


def _draw_bar(axes: Axes, x: float, by_op: dict[str, Measurement], colour: str) -> None:
    dispatch, combine, total = (by_op[op] for op in ("dispatch", "combine", "total"))
    axes.bar(x, dispatch.p50_ms, BAR_WIDTH, color=colour)
    axes.bar(
        x,
        combine.p50_ms,
        BAR_WIDTH,
        bottom=dispatch.p50_ms,
        color=colour,
        alpha=COMBINE_ALPHA,
    )
    top = dispatch.p50_ms + combine.p50_ms
    axes.vlines(x, total.p10_ms, total.p90_ms, color="#333333", linewidth=1)
    ratio = None if total.is_baseline else total.ratio_to_baseline
    speed_up = "" if ratio is None else f"{ratio:.1f}x\n"
    _label(axes, x, max(top, total.p90_ms), f"{speed_up}{total.p50_ms:.3g}")


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text, (x, y), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8
    )
