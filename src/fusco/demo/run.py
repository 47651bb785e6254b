"""The demo from beginning to end: train, check, measure, write."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from fusco.demo import ranks, report
from fusco.demo.compare import compare
from fusco.demo.data import load_corpus
from fusco.demo.output import DemoResult, require_matplotlib, write_output
from fusco.demo.progress import follow
from fusco.demo.speed import measure
from fusco.demo.train import DEFAULT_STEPS, TrainConfig
from fusco.errors import input_error
from fusco.machine import num_cores
from fusco.testing.ranks import RankPool

_PROMPT, _NUM_BYTES = b"def ", 100


def run_demo(
    output_dir: Path, num_ranks: int = 4, steps: int = DEFAULT_STEPS, seed: int = 0
) -> DemoResult:
    """Train a small MoE language model through fusco, check it against one process, measure it.

    Args:
        output_dir: where plots and records go; made if it is not there.
        num_ranks: processes to start: 2, 4, 8 or 16.
        steps: training steps of each run.
        seed: of the model and the data.

    Raises:
        InputError: so many ranks cannot share the model.
        FuscoError: matplotlib or the standard library's sources are missing, or the runs disagree.
        RankFailure: a rank failed.
    """
    start = time.perf_counter()
    require_matplotlib()
    config = TrainConfig(num_steps=steps, seed=seed)
    config.check(num_ranks)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise input_error(
            "demo",
            "output_dir",
            got=str(output_dir),
            expected="a folder that is there or can be made",
            remedy=f"give another one ({error.strerror})",
        ) from error
    corpus = load_corpus()
    console = Console()
    report.print_task(console, config, corpus, num_ranks)
    with RankPool(num_ranks, threads_per_rank=max(1, num_cores() // num_ranks)) as pool:
        with console.status("starting the ranks; the first time, compiling takes half a minute"):
            engine = pool.run(ranks.begin, config)[0]
        report.print_stage(console, f"1/3  Train on {num_ranks} ranks through fusco ({engine})")
        on_ranks = follow(console, steps, pool)
        with console.status("asking the model for text and routing"):
            text = pool.run(ranks.write_text, _PROMPT, _NUM_BYTES)[0]
            routings = pool.run(ranks.record_routing)
            pool.run(ranks.end)

        report.print_stage(console, "2/3  Train the same again in one process, without fusco")
        pool.run(ranks.begin_alone, config)
        alone = follow(console, steps, pool)
        pool.run(ranks.end)
        agreement = compare(on_ranks, alone)
        agreement.check()
        report.print_agreement(console, agreement)

        report.print_stage(console, "3/3  Measure with the routing of this model, and with others")
        with console.status("measuring") as status:
            measurements = measure(
                pool,
                routings,
                config.model.num_experts,
                lambda pattern: status.update(f"measuring {pattern} routing"),
            )
        report.print_speed(console, measurements)
    result = DemoResult(
        config=config,
        ranks=on_ranks,
        alone=alone,
        agreement=agreement,
        routings=routings,
        measurements=measurements,
        text=text,
    )
    files = write_output(result, output_dir)
    report.print_summary(console, result, files, time.perf_counter() - start)
    return result
