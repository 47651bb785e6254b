"""What the demo leaves in its folder: plots, records and the routing."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fusco.bench import Measurement, plot_measurements, write_jsonl
from fusco.demo.compare import Agreement
from fusco.demo.ranks import RankRouting
from fusco.demo.train import StepRecord, TrainConfig
from fusco.errors import FuscoError

RANKS_COLOUR, ALONE_COLOUR = "#0b7a75", "#d1603d"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found.

    Attributes:
        config: what was trained.
        ranks: the steps of the run whose experts were spread over ranks.
        alone: the steps of the same run in one process.
        agreement: how far the two are apart.
        routings: by rank, how the trained model routes held-out text.
        measurements: the benchmark.
        text: what the model writes, after a prompt.
    """

    config: TrainConfig
    ranks: list[StepRecord]
    alone: list[StepRecord]
    agreement: Agreement
    routings: list[RankRouting]
    measurements: list[Measurement]
    text: bytes


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a result was written.

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


def require_matplotlib() -> None:
    """Raises FuscoError, before anything has taken time, where the plots could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FuscoError(
            "demo: matplotlib is not installed, and the demo ends with two plots; "
            "install it: pip install 'fusco[plot]'"
        )


def write_output(result: DemoResult, folder: Path) -> Files:
    """Write everything, over what an earlier demo left in this folder."""
    files = Files(
        loss_plot=folder / "loss.png",
        speed_plot=folder / "speed.png",
        losses=folder / "losses.jsonl",
        measurements=folder / "measurements.jsonl",
        routing=folder / "routing.npz",
    )
    # Matplotlib tells of its font cache, which it makes once, as if it were a fault.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    _plot_losses(result, files.loss_plot)
    plot_measurements(result.measurements, files.speed_plot)
    _write_losses(result, files.losses)
    files.measurements.unlink(missing_ok=True)
    write_jsonl(result.measurements, files.measurements)
    _write_routing(result, files.routing)
    return files


def _write_losses(result: DemoResult, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for run, records in (("ranks", result.ranks), ("alone", result.alone)):
            for record in records:
                file.write(json.dumps({"run": run, **asdict(record)}) + "\n")


def _write_routing(result: DemoResult, path: Path) -> None:
    topk_idx = torch.cat([routing.topk_idx for routing in result.routings], dim=1)
    topk_weights = torch.cat([routing.topk_weights for routing in result.routings], dim=1)
    np.savez_compressed(
        path,
        topk_idx=topk_idx.numpy(),
        topk_weights=topk_weights.numpy(),
        layers=np.arange(len(topk_idx)),
        num_experts=np.array(result.config.model.num_experts),
    )


def _plot_losses(result: DemoResult, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    # The wide line lies under the narrow one: where they agree, one is seen inside the other.
    for records, colour, width, run in (
        (result.alone, ALONE_COLOUR, 5.0, "in one process, all experts local"),
        (result.ranks, RANKS_COLOUR, 1.3, "on the ranks, through fusco"),
    ):
        steps = [record.step for record in records]
        losses = [record.loss for record in records]
        axes.plot(steps, losses, color=colour, linewidth=width, label=f"training, {run}")
        evaluated = {r.step: r.held_out_loss for r in records if r.held_out_loss is not None}
        axes.plot(
            list(evaluated),
            list(evaluated.values()),
            "o",
            color=colour,
            markersize=4 + width,
            label=f"held-out text, {run}",
        )
    axes.set_title("The same model trained twice", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a byte")
    axes.grid(color="#e6e9ed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)
