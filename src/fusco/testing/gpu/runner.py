"""`python -m fusco.testing.gpu`: every check of an engine for GPUs, a line each, on shared GPUs.

Needs torch, numpy and cuda-core, and at least one GPU; ranks share GPUs where there are fewer. With
`--nodes 2 --ranks 2,4` ranks are told that they are on two nodes, which NCCL joins by sockets.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fusco import env
from fusco.testing.cases import tell_nodes
from fusco.testing.conformance import CHECKS
from fusco.testing.faults import Program, expect_survival
from fusco.testing.gpu.checks import GPU_CHECKS
from fusco.testing.nodes import emulated_nodes, node_of_rank
from fusco.testing.ranks import RankFailure, RankPool, subgroup

_ALL = {check.name: check for check in (*CHECKS, *GPU_CHECKS)}
_FAULTS = (("kill", "combine"), ("exit", "dispatch"), ("stop", "backward"), ("idle", "combine"))
_TIMEOUT_S = "30"
_WAITS_OF_A_CHECK = 8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a check."""

    label: str
    failures: list[str]
    seconds: float


def main() -> int:
    """Run, print, and count what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", help='"cuda", or with --nodes "two_level"')
    parser.add_argument("--nodes", type=int, help="nodes to emulate, each with a GPU a rank")
    parser.add_argument("--ranks", default="1,2,3,4,8", help="sizes of groups")
    parser.add_argument("--only", default="", help="names of checks, or parts of them, by comma")
    parser.add_argument("--no-faults", action="store_true", help="end no rank on purpose")
    arguments = parser.parse_args()
    # A check that fails on one rank must not hold up the others for long.
    os.environ.setdefault(env.TIMEOUT_S.name, _TIMEOUT_S)
    members = [int(size) for size in arguments.ranks.split(",")]
    wanted = [part for part in arguments.only.split(",") if part]
    engine = arguments.engine or ("cuda" if arguments.nodes is None else "two_level")
    names = [
        check.name
        for check in _ALL.values()
        if check.only in ("", engine) and (not wanted or any(part in check.name for part in wanted))
    ]
    no_faults = arguments.no_faults or bool(wanted)
    num_failed = num_run = 0
    for outcome in _outcomes(engine, members, names, arguments.nodes, no_faults):
        verdict = "FAIL" if outcome.failures else "pass"
        print(f"{verdict}  {outcome.seconds:6.2f} s  {outcome.label}", flush=True)
        for failure in outcome.failures:
            print(f"      {failure}", flush=True)
        num_run += 1
        num_failed += bool(outcome.failures)
    print(f"{num_run - num_failed} of {num_run} checks passed")
    return int(num_failed > 0 or num_run == 0)


def run_check(
    rank: int, name: str, members: int, engine: str, nodes: tuple[int, ...] = ()
) -> str | None:
    """Run one check on the first ranks of the default group; what failed, or None.

    Args:
        rank: this one.
        name: of the check.
        members: how many ranks.
        engine: as `Shuffle` takes it.
        nodes: of all ranks, where their environment tells them.
    """
    tell_nodes(nodes)
    group = subgroup(range(members))
    if torch.cuda.is_available():
        subgroup(range(members), backend="nccl")
    if group is None:
        return None
    try:
        _ALL[name].fn(group, engine)
    except (AssertionError, RuntimeError) as error:
        return f"rank {rank}: {type(error).__name__}: {error}"
    return None


def _outcomes(
    engine: str, sizes: list[int], names: list[str], num_nodes: int | None, no_faults: bool
) -> Iterator[Outcome]:
    timeout_s = _WAITS_OF_A_CHECK * (env.TIMEOUT_S.get() or 0)
    if num_nodes is None:
        with RankPool(max(sizes), timeout_s=timeout_s) as pool:
            for size in sizes:
                yield from _checks(pool, names, size, engine, ())
    else:
        for size in sizes:
            nodes, told = node_of_rank(size, num_nodes), emulated_nodes(size, num_nodes)
            with RankPool(size, device="cuda", environments=told, timeout_s=timeout_s) as pool:
                yield from _checks(pool, names, size, engine, nodes)
    for fault, when in () if no_faults else _FAULTS:
        begin = time.perf_counter()
        failures = []
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "temporary").mkdir()
            program = Program(
                engine=engine,
                fault=fault,
                when=when,
                folder=Path(folder),
                between_nodes=num_nodes is not None,
            )
            try:
                expect_survival(program)
            except (AssertionError, OSError) as failure:
                failures = [str(failure)]
        label = f"a rank: {fault} before {when}"
        yield Outcome(label=label, failures=failures, seconds=time.perf_counter() - begin)


def _checks(
    pool: RankPool, names: list[str], size: int, engine: str, nodes: tuple[int, ...]
) -> Iterator[Outcome]:
    where = f"{size} ranks" + (f" on {len(set(nodes))} nodes" if nodes else "")
    for name in names:
        begin = time.perf_counter()
        failures = _run(pool, name, size, engine, nodes)
        seconds = time.perf_counter() - begin
        yield Outcome(label=f"{where}, {name}", failures=failures, seconds=seconds)


def _run(pool: RankPool, name: str, size: int, engine: str, nodes: tuple[int, ...]) -> list[str]:
    try:
        outcomes = pool.run(run_check, name, size, engine, nodes)
    except RankFailure as failure:
        return [
            f"rank {rank}: {error.type_name}: {error.message}"
            for rank, error in failure.errors.items()
        ]
    failures = [outcome for outcome in outcomes if outcome is not None]
    if failures:
        pool.close()  # an error of a GPU stays with its process; the next run starts others
    return failures
