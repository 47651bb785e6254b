"""A rank is killed, stopped, or raises: the survivors say who, in time, and exit; no file stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fusco
from fusco.testing.cases import Case, draw
from fusco.testing.faults import CULPRIT, Program, expect_survival
from fusco.testing.ranks import RankPool

# Of the start methods, forkserver is the fast one; spawn ends as a user's interpreter does.
FAULTS = [
    ("kill", "combine", "spawn"),
    ("kill", "dispatch", "forkserver"),
    ("stop", "combine", "forkserver"),
    ("stop", "backward", "forkserver"),
    ("raise", "combine", "forkserver"),
    ("exit", "dispatch", "forkserver"),
    ("idle", "dispatch", "forkserver"),
]


@pytest.mark.parametrize(("fault", "when", "method"), FAULTS)
def test_survivors_name_the_rank_and_exit(
    engine: str,
    fault: str,
    when: str,
    method: str,
    tmp_path: Path,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = files()
    program = Program(engine=engine, fault=fault, when=when, folder=tmp_path)
    pids = [str(pid) for pid in expect_survival(program, method)]
    left = {name for name in files() - before if "fusco" in name or any(p in name for p in pids)}
    assert not left
    assert not list(temporary.iterdir())


def files() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


CASE = Case(num_tokens=(5, 8, 3), hidden_size=16, top_k=2, num_experts=6)
INTERRUPT_S, LATE_S, PROMPT_S = 0.3, 2.5, 60.0


def interrupted(rank: int, engine: str, operation: str) -> list[tuple[str, str]]:
    """The culprit is interrupted while it waits for the others, and calls again as if nothing had
    been; what each of this rank's calls raises."""
    members = range(CASE.num_ranks)
    group = dist.new_group(list(members))
    if rank not in members:
        return []
    inputs = draw(CASE)
    segments = [fusco.Segments(offset=torch.tensor([0]), size=torch.tensor([2]))] * len(members)
    apart = [fusco.Segments(offset=torch.tensor([2 * p]), size=torch.tensor([2])) for p in members]
    raised = []
    with CASE.shuffle(group, engine) as shuffle:
        arguments = inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank)
        d = shuffle.dispatch(*arguments)
        source, out = torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)

        def exchange() -> None:
            fusco.exchange(source, segments, out, apart, group=group, engine=engine)

        exchange()
        calls: dict[str, Callable[[], Any]] = {
            "dispatch": lambda: shuffle.dispatch(*arguments),
            "combine": lambda: shuffle.combine(inputs.outputs[rank], d),
            "exchange": exchange,
        }
        for turn in range(2):
            if turn == 0 and rank != CULPRIT:
                time.sleep(LATE_S)
            started = time.monotonic()
            try:
                if turn == 0 and rank == CULPRIT:
                    signal.signal(signal.SIGALRM, interrupt)
                    signal.setitimer(signal.ITIMER_REAL, INTERRUPT_S)
                calls[operation]()
                raised.append(("nothing", ""))
            except (fusco.FuscoError, KeyboardInterrupt) as error:
                raised.append((type(error).__name__, str(error)))
            assert time.monotonic() - started < PROMPT_S
    return raised


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("operation", ["dispatch", "combine", "exchange"])
def test_an_error_of_one_rank_after_all_agreed(pool: RankPool, engine: str, operation: str) -> None:
    outcomes = pool.run(interrupted, engine, operation)[: CASE.num_ranks]
    for rank, (first, second) in enumerate(outcomes):
        if rank == CULPRIT:
            assert first[0] == "KeyboardInterrupt"
        else:
            assert first[0] == "PeerError", first
            assert f"rank {CULPRIT} has left after an error of its own" in first[1]
        assert second[0] == "ClosedError", second
