"""A progress bar with the loss; plain lines where the output is no terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fusco.demo.train import StepRecord


def follow(console: Console, num_steps: int, advance: Callable[[], StepRecord]) -> list[StepRecord]:
    """Calls `advance` for every step and shows how far it is and how well it learns."""
    records = []
    with Progress(
        TextColumn(" "),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("training", total=num_steps, losses="")
        held_out = ""
        for _ in range(num_steps):
            record = advance()
            records.append(record)
            if record.held_out_loss is not None:
                held_out = f", held out {record.held_out_loss:.3f}"
                progress.console.print(f"  step {record.step:4d}  loss {record.loss:.3f}{held_out}")
            progress.update(task, advance=1, losses=f"loss {record.loss:.3f}{held_out}")
    return records
