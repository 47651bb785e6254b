"""A plot of measurements: the floor, fusco and the baseline, pattern by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusco.bench.records import Measurement
from fusco.errors import FuscoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR_COLOUR, FUSCO_COLOUR, BASELINE_COLOUR = "#aab2bd", "#0b7a75", "#d1603d"
COMBINE_ALPHA = 0.6
BAR_STEP, BAR_WIDTH = 0.28, 0.26


def plot_measurements(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw the times of each pattern as bars and write them to `path` (png, svg or pdf).

    A bar is the p50 of dispatch with the p50 of combine on top; its whisker goes from the p10 to
    the p90 of both together. All measurements are of one configuration but for the pattern.

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

    patterns = list(dict.fromkeys(m.pattern for m in measurements))
    figure = Figure(figsize=(3.0 + 1.6 * len(patterns), 4.8), layout="constrained")
    axes = figure.add_subplot()
    for place, pattern in enumerate(patterns):
        of_pattern = [m for m in measurements if m.pattern == pattern]
        fusco = {m.op: m for m in of_pattern if not m.is_baseline}
        baseline = {m.op: m for m in of_pattern if m.is_baseline}
        _draw_floor(axes, place - BAR_STEP, fusco["total"])
        _draw_bar(axes, place, fusco, FUSCO_COLOUR)
        _draw_bar(axes, place + BAR_STEP, baseline, BASELINE_COLOUR)
    one = measurements[0]
    axes.set_title(
        f"Dispatch and combine of {one.num_ranks} ranks, {one.num_tokens} tokens a rank,\n"
        f"hidden {one.hidden_size}, {one.dtype}, top-{one.top_k} of {one.num_experts} experts",
        fontsize=10,
    )
    axes.set_ylabel("slowest rank's time, ms")
    axes.set_xticks(range(len(patterns)), patterns)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e6e9ed")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    ours = next(m.engine for m in measurements if not m.is_baseline)
    theirs = next(m.engine for m in measurements if m.is_baseline)
    handles = [
        Patch(color=FLOOR_COLOUR, label="floor: each row read and written once"),
        Patch(color=FUSCO_COLOUR, label=f"fusco ({ours}), with speed-up"),
        Patch(color=BASELINE_COLOUR, label=theirs),
        Patch(color="#666666", alpha=COMBINE_ALPHA, label="lighter part: combine"),
    ]
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
    speed_up = "" if total.is_baseline else f"{total.ratio_to_baseline:.1f}x\n"
    _label(axes, x, max(top, total.p90_ms), f"{speed_up}{total.p50_ms:.3g}")


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text, (x, y), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8
    )
