"""`fusco demo`: train a small MoE language model through fusco, check it and measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusco.cli.failures import short_failures


def demo(
    output_dir: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the plot and the records.")
    ] = Path("demo-output"),
    num_ranks: Annotated[int, typer.Option(help="Ranks to start.")] = 4,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Training steps of each of two runs.",
            show_default="100; all of the demo takes about a minute on two cores",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the model and the data.")] = 0,
) -> None:
    """Train a small MoE language model on real text through fusco, check it, and measure it."""
    with short_failures():
        from fusco.demo import run_demo

        length = {} if steps is None else {"steps": steps}
        run_demo(output_dir=output_dir, num_ranks=num_ranks, seed=seed, **length)
