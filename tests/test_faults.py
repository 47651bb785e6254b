"""A rank is killed, stopped, or raises: the survivors say who, in time, and exit; no file stays.

Real programs in processes of their own, which end as a user's would: by an uncaught error.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fusco

NUM_RANKS = 3
CULPRIT = 1
TIMEOUT_S = 4.0
# On top of the timeout: a loaded machine, and an interpreter that unloads torch.
SLACK_S = 20.0
START_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the ranks run.

    Attributes:
        fault: "kill", "stop", "raise" or "exit".
        when: "dispatch", "combine" or "backward": the call before which the culprit fails.
    """

    engine: str
    fault: str
    when: str
    folder: Path


def main(rank: int, program: Program) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    tempfile.tempdir = str(program.folder / "temporary")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(program.folder / "inductor")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(program.folder / "store"), NUM_RANKS),
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    shuffle = fusco.Shuffle(
        num_experts=6,
        hidden_size=8,
        top_k=2,
        max_tokens=16,
        dtype=torch.float32,
        engine=program.engine,
        timeout_s=TIMEOUT_S,
    )
    x = torch.randn(16, 8, requires_grad=True)
    idx, weights = torch.randint(6, (16, 2)), torch.rand(16, 2)
    for step in range(3):
        fails = rank == CULPRIT and step == 2
        started = time.monotonic()
        try:
            if fails and program.when == "dispatch":
                fail(program.fault)
            d = shuffle.dispatch(x, idx, weights)
            if fails and program.when == "combine":
                fail(program.fault)
            assert isinstance(d.tokens, torch.Tensor)
            y = shuffle.combine(d.tokens * 2, d)
            if fails and program.when == "backward":
                fail(program.fault)
            y.sum().backward()
        except fusco.PeerError as error:
            took_s = time.monotonic() - started
            closed = ""
            try:
                shuffle.dispatch(x, idx, weights)
            except fusco.ClosedError:
                closed = "closed"
            report = f"{error.rank} {took_s} {closed}\n{error.operation}\n{error}"
            (program.folder / f"report-{rank}").write_text(report)
            raise


def fail(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "raise":
        raise RuntimeError("a mistake of the user's between two calls")
    else:
        raise SystemExit(0)


def start(program: Program, method: str) -> list[BaseProcess]:
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["torch", "torch.distributed", "fusco", "numba"])
    processes: list[BaseProcess] = [
        context.Process(target=main, args=(rank, program), daemon=True) for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    return processes


def files() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


# Of the start methods, forkserver is the fast one; spawn ends as a user's interpreter does.
FAULTS = [
    ("kill", "combine", "spawn"),
    ("kill", "dispatch", "forkserver"),
    ("stop", "combine", "forkserver"),
    ("stop", "backward", "forkserver"),
    ("raise", "combine", "forkserver"),
    ("exit", "dispatch", "forkserver"),
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
    processes = start(Program(engine=engine, fault=fault, when=when, folder=tmp_path), method)
    survivors = [rank for rank in range(NUM_RANKS) if rank != CULPRIT]
    try:
        for rank in survivors:
            processes[rank].join(START_S)
            assert processes[rank].exitcode == 1, f"rank {rank}: {processes[rank].exitcode}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank in survivors:
        named, took_s, closed = (tmp_path / f"report-{rank}").read_text().splitlines()[0].split(" ")
        operation, text = (tmp_path / f"report-{rank}").read_text().split("\n", 2)[1:]
        assert int(named) == CULPRIT, text
        assert float(took_s) < TIMEOUT_S + SLACK_S, text
        assert closed == "closed"
        assert operation.split()[0] in ("dispatch", "combine")
        assert f"rank {CULPRIT}" in text
        assert operation in text
    pids = {str(process.pid) for process in processes}
    left = {name for name in files() - before if "fusco" in name or any(p in name for p in pids)}
    assert not left
    assert not list(temporary.iterdir())
