"""The demo from beginning to end: train, check, measure, write. `run_demo` is all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fusco.bench import Measurement
from fusco.bench.records import num_cores
from fusco.demo import ranks, report
from fusco.demo.compare import Agreement, compare
from fusco.demo.data import Corpus, load_corpus
from fusco.demo.files import (
    Files,
    draw_plots,
    require_matplotlib,
    write_losses,
    write_measurements,
    write_routing,
)
from fusco.demo.progress import TrainingProgress
from fusco.demo.speed import measure
from fusco.demo.train import StepRecord, TrainConfig, Trainer
from fusco.testing.ranks import RankPool

DEFAULT_STEPS = 120
PROMPT, NUM_BYTES_WRITTEN = b"def ", 160


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found; all of it is also in `files`."""

    ranks: list[StepRecord]
    alone: list[StepRecord]
    agreement: Agreement
    measurements: list[Measurement]
    text: bytes
    files: Files


def run_demo(
    output_dir: Path,
    num_ranks: int = 4,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    console: Console | None = None,
) -> DemoResult:
    """Train a small MoE language model through fusco, check it against one process, measure it.

    Args:
        output_dir: where plots and records go; made if it is not there.
        num_ranks: processes to start, 2, 4, 8 or 16.
        steps: training steps of each run.
        seed: of the model and the data.
        console: where to print.

    Raises:
        InputError: the ranks cannot share the model.
        FuscoError: matplotlib is missing, or the runs disagree.
        RankFailure: a rank failed.
    """
    start = time.perf_counter()
    console = console or Console()
    require_matplotlib()
    config = TrainConfig(num_steps=steps, seed=seed)
    config.check(num_ranks)
    output_dir.mkdir(parents=True, exist_ok=True)
    files = Files.within(output_dir)
    corpus = load_corpus()
    report.print_task(console, config, corpus, num_ranks)
"""
