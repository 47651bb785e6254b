"""A progress bar with the loss; plain lines where the output is no terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fusco.demo.ranks import advance
from fusco.demo.train import StepRecord
from fusco.testing.ranks import RankPool


def follow(console: Console, num_steps: int, pool: RankPool) -> list[StepRecord]:
    """Takes the run that the ranks have begun to its end, and shows how well it learns."""
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
            record = pool.run(advance)[0]
            records.append(record)
            if record.held_out_loss is not None:
                held_out = f", held out {record.held_out_loss:.3f}"
                progress.console.print(f"  step {record.step:4d}  loss {record.loss:.3f}{held_out}")
            progress.update(task, advance=1, losses=f"loss {record.loss:.3f}{held_out}")
    return records
