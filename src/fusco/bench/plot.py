"""A plot of measurements: large batches beside their floor, small ones, and the curve over SMs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusco.bench.config import LARGE_TOKENS
from fusco.bench.records import PAIR_OPS, Measurement
from fusco.errors import FuscoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR_COLOUR = "#39424e"
FUSCO_COLOUR = "#0b7a75"
BASELINE_COLOURS = ("#d1603d", "#e0a458", "#8d7b9f")
COMBINE_ALPHA = 0.6
BAR_WIDTH = 0.92


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Bars that stand together: one configuration, by label and operation; fusco first."""

    name: str
    bars: dict[str, dict[str, Measurement]]


def plot_measurements(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw all that is in a record and write it to `path` (png, svg or pdf).

    Every configuration is a group of bars; a bar is the p50 of the pair, divided as its dispatch
    and its combine alone are, and its whisker goes from p10 to p90. GPU batches below
    `LARGE_TOKENS` have a panel of their own, in all modes, and so have the times over `num_sms`.
    Where a configuration was measured twice, the last one counts.

    Raises:
        FuscoError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FuscoError(
            "plot: matplotlib is not installed; install it: pip install 'fusco[plot]'"
        ) from error

    pairs = [m for m in measurements if m.op in PAIR_OPS and m.mode != "in place"]
    small = [m for m in pairs if m.device == "cuda" and m.num_tokens < LARGE_TOKENS]
    large = [m for m in pairs if m not in small]
    groups = _groups([m for m in large if m.num_sms is None or m.is_baseline])
    curve = [m for m in large if m.num_sms is not None and not m.is_baseline]
    rows: list[Any] = [["large", "large"]] if groups else []
    lower = [name for name, found in (("small", small), ("curve", curve)) if found]
    if lower:
        rows.append(lower * (2 // len(lower)))
    num_bars = sum(len(group.bars) + 1 for group in groups)
    figure = Figure(figsize=(max(9.0, 0.45 * num_bars), 4.4 * len(rows)), layout="constrained")
    axes = figure.subplot_mosaic(rows)
    if groups:
        _draw_large(axes["large"], groups)
    if small:
        _draw_small(axes["small"], small)
    if curve:
        _draw_curve(axes["curve"], curve)
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
        each.grid(axis="y", color="#e6e9ed")
    one = measurements[0]
    where = f"{one.num_ranks} x {one.hardware['gpu']}" if "gpu" in one.hardware else "CPU ranks"
    figure.suptitle(
        f"Dispatch and combine, {where}, hidden {one.hidden_size}, {one.dtype}", fontsize=12
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _groups(measurements: Sequence[Measurement]) -> list[_Group]:
    found: dict[str, dict[str, dict[str, Measurement]]] = {}
    patterns = list(dict.fromkeys(m.pattern for m in measurements))
    by_size = sorted(
        measurements,
        key=lambda m: (patterns.index(m.pattern), m.num_ranks, m.num_tokens, -m.hidden_size),
    )
    for m in by_size:
        size = f"{m.num_ranks} x {m.num_tokens:,} tokens"
        if m.hidden_size != measurements[0].hidden_size:  # which the title tells
            size += f"\nhidden {m.hidden_size:,}"
        name = f"{m.pattern}\n{size}\ntop-{m.top_k} of {m.num_experts}"
        found.setdefault(name, {}).setdefault(_bar_name(m), {})[m.op] = m
    return [
        # What was measured as a whole only is another mode beside the main one.
        _Group(name=name, bars={k: ops for k, ops in bars.items() if set(ops) == set(PAIR_OPS)})
        for name, bars in found.items()
    ]


def _bar_name(m: Measurement) -> str:
    name = m.engine if m.is_baseline else f"fusco ({m.engine})"
    return f"{name}, {m.mode}" if m.device == "cuda" else name


def _draw_large(axes: Axes, groups: Sequence[_Group]) -> None:
    from matplotlib.patches import Patch

    colours = _colours(groups)
    place, ticks = 0.0, []
    for group in groups:
        ticks.append(place + (len(group.bars) - 1) / 2)
        for x, (name, ops) in enumerate(group.bars.items(), 1):
            _draw_pair(axes, place + x - 1, ops, colours[name])
        place += len(group.bars) + 0.8
    axes.axhline(1, color=FLOOR_COLOUR, linewidth=1.2, linestyle="--")
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    handles.append(Patch(color="#666666", alpha=COMBINE_ALPHA, label="lighter part: combine"))
    axes.set_ylabel("time over the floor (dashed); labels in ms")
    axes.set_xticks(ticks, [group.name for group in groups], fontsize=9)
    axes.margins(x=0.02, y=0.16)
    axes.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9)
    axes.set_ylim(top=1.12 * axes.get_ylim()[1])


def _draw_pair(axes: Axes, x: float, ops: dict[str, Measurement], colour: str) -> None:
    dispatch, combine, total = (ops[op] for op in PAIR_OPS)
    height = total.p50_ms / total.floor_ms
    share = dispatch.p50_ms / (dispatch.p50_ms + combine.p50_ms)
    axes.bar(x, share * height, BAR_WIDTH, color=colour)
    axes.bar(
        x, (1 - share) * height, BAR_WIDTH, bottom=share * height, color=colour, alpha=COMBINE_ALPHA
    )
    low, high = total.p10_ms / total.floor_ms, total.p90_ms / total.floor_ms
    axes.vlines(x, low, high, color="#333333", linewidth=1)
    ratio = None if total.is_baseline else total.ratio_to_baseline
    speed_up = "" if ratio is None else f"{ratio:.1f}x\n"
    _label(axes, x, max(height, high), f"{speed_up}{total.p50_ms:.3g}")


def _draw_small(axes: Axes, measurements: Sequence[Measurement]) -> None:
    """The pair of small batches, in every mode."""
    ours_first = sorted(measurements, key=lambda m: m.is_baseline)
    totals = {(_bar_name(m), m.num_tokens): m for m in ours_first if m.op == "total"}
    names = []
    for x, ((name, num_tokens), m) in enumerate(totals.items()):
        axes.bar(x, m.p50_ms, 0.75, color=BASELINE_COLOURS[0] if m.is_baseline else FUSCO_COLOUR)
        axes.vlines(x, m.p10_ms, m.p90_ms, color="#333333", linewidth=1)
        _label(axes, x, max(m.p50_ms, m.p90_ms), f"{m.p50_ms:.3g}")
        words = [*name.split(), f"{num_tokens:,} tokens"]  # a line each, for bars stand close
        names.append("\n".join(words))
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("dispatch and combine, ms")
    axes.set_title("small batches", fontsize=10)
    axes.margins(y=0.12)


def _draw_curve(axes: Axes, measurements: Sequence[Measurement]) -> None:
    styles = {"dispatch": ("o", 1.0), "combine": ("s", COMBINE_ALPHA), "total": ("D", 1.0)}
    for op, (marker, alpha) in styles.items():
        points = sorted({m.num_sms or 0: m for m in measurements if m.op == op}.items())
        xs, ys = [sms for sms, _ in points], [m.p50_ms for _, m in points]
        axes.plot(xs, ys, color=FUSCO_COLOUR, alpha=alpha, marker=marker, markersize=5, label=op)
        if op == "total":
            for sms, m in points:
                _label(axes, sms, m.p50_ms, f"{m.p50_ms:.3g}", dx=5, ha="left")
            floor = points[-1][1].floor_ms
            axes.axhline(
                floor, color=FLOOR_COLOUR, linewidth=1.2, linestyle="--", label="floor of total"
            )
    one = measurements[0]
    axes.set_xticks(sorted({m.num_sms or 0 for m in measurements}))
    axes.set_xlabel("multiprocessors that fusco may take (num_sms)")
    axes.set_ylabel("p50, ms")
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.set_title(f"{one.pattern}, {one.num_tokens:,} tokens a rank", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def _colours(groups: Sequence[_Group]) -> dict[str, str]:
    names = list(dict.fromkeys(name for group in groups for name in group.bars))
    ours = [name for name in names if name.startswith("fusco")]
    others = [name for name in names if name not in ours]
    return {
        **dict.fromkeys(ours, FUSCO_COLOUR),
        **dict(zip(others, BASELINE_COLOURS, strict=False)),
    }


def _label(axes: Axes, x: float, y: float, text: str, dx: float = 0, ha: str = "center") -> None:
    axes.annotate(text, (x, y), (dx, 3), textcoords="offset points", ha=ha, va="bottom", fontsize=8)
