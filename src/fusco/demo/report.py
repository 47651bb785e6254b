"""What the demo prints, for a reader who meets fusco for the first time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fusco.bench import Measurement
from fusco.demo.compare import EARLY_TOLERANCE, NUM_EARLY_STEPS, TOLERANCE, Agreement
from fusco.demo.data import VOCABULARY_SIZE, Corpus
from fusco.demo.output import DemoResult, Files
from fusco.demo.train import TrainConfig


def print_task(console: Console, config: TrainConfig, corpus: Corpus, num_ranks: int) -> None:
    """What is about to be trained, and on what."""
    model = config.model
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in (
        (
            "text",
            f"{corpus.num_files} files of Python's standard library, byte by byte: "
            f"{len(corpus.train) / 1e6:.1f} MB to learn from, "
            f"{len(corpus.held_out) / 1e6:.1f} MB held out",
        ),
        (
            "model",
            f"{model.num_layers} layers of attention and experts, hidden {model.hidden_size}, "
            f"every byte takes {model.top_k} of {model.num_experts} experts in each",
        ),
        (
            "ranks",
            f"{num_ranks} processes with {model.num_experts // num_ranks} experts each and "
            f"{config.num_sequences // num_ranks} of the {config.num_sequences} sequences a step",
        ),
    ):
        grid.add_row(name, value)
    console.print(Text("A small MoE language model, with its experts spread over ranks", "bold"))
    console.print(grid)


def print_stage(console: Console, heading: str) -> None:
    """The heading of one of the demo's three parts."""
    console.print()
    console.print(Text(heading, style="bold"))


def print_agreement(console: Console, agreement: Agreement) -> None:
    """How far the two runs are apart."""
    first = min(agreement.num_alike, NUM_EARLY_STEPS)
    console.print(
        f"  [green]The losses agree[/green]: max difference {agreement.train:.0e} nats "
        f"in training, {agreement.held_out:.0e} held out\n"
        f"  (tolerance {EARLY_TOLERANCE:.0e} in the first {first} steps, {TOLERANCE:.0e} in all)"
    )
    if agreement.num_ties:
        console.print(
            f"  After {agreement.num_alike} steps experts tied: of all choices "
            f"{agreement.num_ties} fell differently, and from there on the runs drift apart"
        )


def print_speed(console: Console, measurements: Sequence[Measurement]) -> None:
    """Dispatch and combine of each pattern, beside the baseline."""
    one = measurements[0]
    console.print(
        f"  dispatch + combine, p50 in ms: {one.num_tokens} tokens a rank, hidden "
        f"{one.hidden_size}, {one.dtype}"
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("routing", no_wrap=True)
    for heading in ("nodes", "busiest rank", "all_to_all", "fusco", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    totals = [m for m in measurements if m.op == "total"]
    for ours, theirs in zip(
        (m for m in totals if not m.is_baseline), (m for m in totals if m.is_baseline), strict=True
    ):
        table.add_row(
            ours.pattern,
            str(ours.num_nodes),
            f"{ours.load_imbalance:.2f}x mean",
            f"{theirs.p50_ms:.1f}",
            f"{ours.p50_ms:.1f}",
            f"{ours.ratio_to_baseline:.1f}x",
            style="bold" if ours is totals[0] else None,
        )
    console.print(table)


def print_summary(console: Console, result: DemoResult, files: Files, elapsed_s: float) -> None:
    """The whole demo in a few sentences, and where to look next."""
    ranks, agreement = result.ranks, result.agreement
    total = next(m for m in result.measurements if m.op == "total" and not m.is_baseline)
    assert total.ratio_to_baseline is not None, "the demo measures a baseline"
    faster = total.ratio_to_baseline >= 1
    ratio = total.ratio_to_baseline if faster else 1 / total.ratio_to_baseline
    sentences = Text.assemble(
        ("It learns. ", "bold"),
        f"In {len(ranks)} steps the loss on held-out text fell to {ranks[-1].held_out_loss:.2f} "
        f"nats a byte; knowing nothing is {math.log(VOCABULARY_SIZE):.2f}.\n",
        ("It is the same model. ", "bold"),
        "One process with all the experts, and no fusco, got the same losses to within "
        f"{max(agreement.train, agreement.held_out):.0e} nats.\n",
        ("It is fast. " if faster else "It is slow here. ", "bold"),
        f"With this model's routing, fusco moves {total.num_tokens} tokens a rank to their experts "
        f"and back in {total.p50_ms:.1f} ms, {ratio:.1f} times {'faster' if faster else 'slower'} "
        "than all_to_all with permutes.",
    )
    console.print()
    console.print(Panel(_readable(result.text), title="what the model writes", title_align="left"))
    console.print(
        Panel(sentences, title=f"fusco demo, {elapsed_s:.0f} s", title_align="left", style="green")
    )
    console.print("Written:")
    meanings = {
        files.loss_plot: "the losses of both runs",
        files.speed_plot: "the benchmark",
        files.losses: "the losses, an object a step",
        files.measurements: "the benchmark, an object a measurement",
        files.routing: "the routing, as a trace",
    }
    width = max(len(str(path)) for path in meanings)
    for path, meaning in meanings.items():
        line = Text.assemble(f"  {path!s:{width}}  ", (meaning, "dim"))
        console.print(line, soft_wrap=True)
    again = f"Measure with it again: fusco bench --pattern trace --trace {files.routing}"
    console.print(again, soft_wrap=True, highlight=False)


def _readable(text: bytes) -> Text:
    """Bytes as a terminal may show them; a young model may write any."""
    decoded = text.decode("utf-8", errors="replace")
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in decoded))
