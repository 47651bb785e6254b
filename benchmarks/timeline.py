"""Draw when each slice of one dispatch and one combine was gathered, on the network and scattered.

    python benchmarks/timeline.py benchmarks/results/timeline.png

Runs on a test cluster of four hosts of two ranks (Linux, root, ip and tc) and draws rank 0.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import fusco
from fusco.profiling import SliceMark, recording
from fusco.testing.cluster import Cluster
from fusco.testing.ranks import RankPool

NUM_TOKENS, HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 1024, 2048, 8, 64
STAGES = {"load": "gather, sum", "send": "send", "receive": "receive", "unload": "scatter, sum"}
COLORS = {"load": "tab:blue", "send": "tab:orange", "receive": "tab:green", "unload": "tab:red"}


def record(rank: int) -> dict[str, list[SliceMark]]:
    """The marks of this rank's third dispatch and combine, in seconds from their beginning."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator).bfloat16()
    found: dict[str, list[SliceMark]] = {}
    with fusco.Shuffle(
        num_experts=NUM_EXPERTS, hidden_size=HIDDEN_SIZE, top_k=TOP_K, max_tokens=NUM_TOKENS
    ) as shuffle:
        for _ in range(3):
            scores = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator)
            weights, topk_idx = scores.topk(TOP_K)
            dist.barrier()
            begin_s = time.perf_counter()
            with recording() as marks:
                d = shuffle.dispatch(x, topk_idx, weights)
            found["dispatch"] = [shifted(mark, begin_s) for mark in marks]
            assert isinstance(d.tokens, torch.Tensor)
            rows = d.tokens.clone()
            dist.barrier()
            begin_s = time.perf_counter()
            with recording() as marks:
                shuffle.combine(rows, d)
            found["combine"] = [shifted(mark, begin_s) for mark in marks]
    return found


def shifted(mark: SliceMark, begin_s: float) -> SliceMark:
    return SliceMark(
        operation=mark.operation,
        stage=mark.stage,
        peer=mark.peer,
        step=mark.step,
        begin_s=mark.begin_s - begin_s,
        end_s=mark.end_s - begin_s,
    )


def draw(found: dict[str, list[SliceMark]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (operation, marks) in zip(figure.subplots(2, 1), found.items(), strict=True):
        steps = 1 + max(mark.step for mark in marks)
        for number, stage in enumerate(STAGES):
            for mark in (each for each in marks if each.stage == stage):
                axes.barh(
                    number + 0.9 * mark.step / steps,
                    1e3 * (mark.end_s - mark.begin_s),
                    0.8 / steps,
                    1e3 * mark.begin_s,
                    color=COLORS[stage],
                    alpha=0.6,
                    align="edge",
                )
        axes.set_yticks([number + 0.45 for number in range(len(STAGES))], list(STAGES.values()))
        axes.set_title(f"{operation}: the slices of rank 0, one line a step")
        axes.set_xlabel("ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    with (
        Cluster((2, 2, 2, 2), rate="400mbit") as cluster,
        RankPool(8, seats=cluster.seats) as pool,
    ):
        draw(pool.run(record)[0], Path(sys.argv[1]))


if __name__ == "__main__":
    main()
