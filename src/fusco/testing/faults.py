"""A rank is killed, stopped, idle, or raises: the survivors must say who, in time, and exit.

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

import torch
import torch.distributed as dist

import fusco
from fusco.testing.cases import device_of, expect
from fusco.testing.nodes import emulated_nodes
from fusco.testing.ranks import BACKENDS

NUM_RANKS = 3
CULPRIT = 1
SURVIVORS = tuple(rank for rank in range(NUM_RANKS) if rank != CULPRIT)
TIMEOUT_S = 6.0
# On top of the timeout: a loaded machine, and an interpreter that unloads torch.
_SLACK_S = 20.0
_START_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the ranks run.

    Attributes:
        engine: of the Shuffle.
        fault: "kill", "stop", "idle", "raise" or "exit".
        when: "dispatch", "combine" or "backward": the call before which the culprit fails.
        folder: for files of the programs; empty.
        between_nodes: every rank is a node of its own, with a GPU, and NCCL joins them.
    """

    engine: str
    fault: str
    when: str
    folder: Path
    between_nodes: bool = False


def expect_survival(program: Program, method: str = "spawn") -> list[int]:
    """Run the program: every survivor names the culprit in time and ends with its error.

    Args:
        program: what the ranks run.
        method: how their processes are started.

    Returns:
        the process ids of all ranks, which have ended.
    """
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["torch", "torch.distributed", "fusco", "numba"])
    processes: list[BaseProcess] = [
        context.Process(  # type: ignore[attr-defined] # of every context but not of their base
            target=_main, args=(rank, program), daemon=True
        )
        for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    try:
        for rank in SURVIVORS:
            processes[rank].join(_START_S)
            code = processes[rank].exitcode
            output = (program.folder / f"output-{rank}").read_text()
            expect(code == 1, f"rank {rank} ended with {code}: {output[-1000:]}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank in SURVIVORS:
        first, operation, text = (program.folder / f"report-{rank}").read_text().split("\n", 2)
        named, took_s, closed = first.split(" ")
        expect(int(named) == CULPRIT, text)
        expect(float(took_s) < TIMEOUT_S + _SLACK_S, f"after {took_s} s: {text}")
        expect(closed == "closed", "the Shuffle is still open")
        expect(operation.split()[0] in ("dispatch", "combine"), operation)
        expect(f"rank {CULPRIT}" in text, text)
        expect(operation in text, text)
    return [process.pid for process in processes if process.pid is not None]


def _main(rank: int, program: Program) -> None:
    # How a rank ends is what this is about; what it prints then would only be in the way.
    with open(program.folder / f"output-{rank}", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    tempfile.tempdir = str(program.folder / "temporary")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(program.folder / "inductor")
    torch.set_num_threads(1)
    device = torch.device("cuda" if program.between_nodes else device_of(program.engine))
    if program.between_nodes:
        os.environ.update(emulated_nodes(NUM_RANKS, NUM_RANKS)[rank])
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        BACKENDS["cuda"] if program.between_nodes else BACKENDS["cpu"],
        store=dist.FileStore(  # type: ignore[attr-defined]
            str(program.folder / "store"), NUM_RANKS
        ),
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    dist.barrier()  # not all have started at once
    shuffle = fusco.Shuffle(
        num_experts=6,
        hidden_size=8,
        top_k=2,
        max_tokens=16,
        dtype=torch.float32,
        engine=program.engine,
        timeout_s=TIMEOUT_S,
    )
    x = torch.randn(16, 8, device=device, requires_grad=True)
    idx, weights = torch.randint(6, (16, 2), device=device), torch.rand(16, 2, device=device)
    for step in range(3):
        fails = rank == CULPRIT and step == 2
        started = time.monotonic()
        try:
            if fails and program.when == "dispatch":
                _fail(program.fault)
            d = shuffle.dispatch(x, idx, weights)
            if fails and program.when == "combine":
                _fail(program.fault)
            y = shuffle.combine(d.tokens * 2, d)
            if fails and program.when == "backward":
                _fail(program.fault)
            y.sum().backward()
            shuffle.synchronize()
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


def _fail(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "idle":
        time.sleep(2 * _START_S)
    elif fault == "raise":
        raise RuntimeError("a mistake of the user's between two calls")
    else:
        raise SystemExit(0)
