"""What the demo leaves in its folder: plots, records and the routing."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fusco.bench import Measurement, plot_measurements, write_jsonl
from fusco.demo.ranks import RankRouting
from fusco.demo.train import StepRecord
from fusco.errors import FuscoError

RANKS_COLOUR, ALONE_COLOUR = "#0b7a75", "#d1603d"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where everything is written, and what it is.

    Attributes:
        loss_plot: both runs' losses.
        speed_plot: the benchmark.
        losses: one JSON object a run and step.
        measurements: one JSON object a measurement, as `fusco bench --output` writes them.
        routing: what the routers decided, as `fusco bench --trace` reads it.
    """

    loss_plot: Path
    speed_plot: Path
    losses: Path
    measurements: Path
    routing: Path

    @classmethod
    def within(cls, folder: Path) -> Files:
        return cls(
            loss_plot=folder / "loss.png",
            speed_plot=folder / "speed.png",
            losses=folder / "losses.jsonl",
            measurements=folder / "measurements.jsonl",
            routing=folder / "routing.npz",
        )


def require_matplotlib() -> None:
    """Raises FuscoError, before anything has taken time, where the plots could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FuscoError(
            "demo: matplotlib is not installed, and the demo draws plots with it; "
            "install it: pip install 'fusco[plot]'"
        )


def write_losses(path: Path, runs: dict[str, Sequence[StepRecord]]) -> None:
    """One line a run and step, over what an earlier demo left."""
    lines = [
        json.dumps({"run": run, **asdict(record)}) for run, records in runs.items() for record in records
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_measurements(path: Path, measurements: Sequence[Measurement]) -> None:
    """Over what an earlier demo left."""
    path.unlink(missing_ok=True)
    write_jsonl(measurements, path)


def write_routing(path: Path, routings: Sequence[RankRouting], num_experts: int) -> None:
    """Tokens of all ranks, rank by rank."""
    topk_idx = torch.cat([routing.topk_idx for routing in routings], dim=1)
    topk_weights = torch.cat([routing.topk_weights for routing in routings], dim=1)
    np.savez_compressed(
        path,
        topk_idx=topk_idx.numpy(),
        topk_weights=topk_weights.numpy(),
        layers=np.arange(len(topk_idx)),
        num_experts=num_experts,
    )


def draw_plots(
    files: Files,
    ranks: Sequence[StepRecord],
    alone: Sequence[StepRecord],
    measurements: Sequence[Measurement],
) -> None:
    """The losses of both runs, and the benchmark."""
    # Matplotlib tells of its font cache, which it makes once, as if it were a fault.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    _plot_losses(files.loss_plot, ranks, alone)
    plot_measurements(measurements, files.speed_plot)


def _plot_losses(path: Path, ranks: Sequence[StepRecord], alone: Sequence[StepRecord]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    steps = [record.step for record in ranks]
    axes.plot(
        steps, [r.loss for r in alone], color=ALONE_COLOUR, linewidth=4, alpha=0.45,
        label="training, one process, all experts local",
    )  # fmt: skip
    axes.plot(
        steps, [r.loss for r in ranks], color=RANKS_COLOUR, linewidth=1.2,
        label="training, experts on all ranks, through fusco",
    )  # fmt: skip
    for records, colour, marker, size, label in (
        (alone, ALONE_COLOUR, "o", 11, "held out, one process"),
        (ranks, RANKS_COLOUR, "o", 5, "held out, through fusco"),
    ):
        evaluated = [(r.step, r.held_out_loss) for r in records if r.held_out_loss is not None]
        axes.plot(*zip(*evaluated, strict=True), marker, color=colour, markersize=size, label=label)
    axes.set_title("The same model, trained both ways", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a byte")
    axes.grid(color="#e6e9ed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)
