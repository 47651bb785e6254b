"""`python -m fusco.testing.gpu`: every check of the CUDA engine, a line each, on shared GPUs.

Needs torch, numpy and cuda-core, and at least one GPU; ranks share GPUs where there are fewer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusco import env
from fusco.testing.conformance import CHECKS
from fusco.testing.faults import Program, expect_survival
from fusco.testing.gpu.checks import GPU_CHECKS
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
    parser.add_argument("--engine", default="cuda")
    parser.add_argument("--ranks", default="1,2,3,4,8", help="sizes of groups")
    parser.add_argument("--only", default="", help="names of checks, or parts of them, by comma")
    parser.add_argument("--no-faults", action="store_true", help="end no rank on purpose")
    arguments = parser.parse_args()
    # A check that fails on one rank must not hold up the others for long.
    os.environ.setdefault(env.TIMEOUT_S.name, _TIMEOUT_S)
    members = [int(size) for size in arguments.ranks.split(",")]
    wanted = [part for part in arguments.only.split(",") if part]
    names = [name for name in _ALL if not wanted or any(part in name for part in wanted)]
    num_failed = num_run = 0
    for outcome in _outcomes(arguments.engine, members, names, arguments.no_faults or bool(wanted)):
        verdict = "FAIL" if outcome.failures else "pass"
        print(f"{verdict}  {outcome.seconds:6.2f} s  {outcome.label}", flush=True)
        for failure in outcome.failures:
            print(f"      {failure}", flush=True)
        num_run += 1
        num_failed += bool(outcome.failures)
    print(f"{num_run - num_failed} of {num_run} checks passed")
    return int(num_failed > 0 or num_run == 0)


def run_check(rank: int, name: str, members: int, engine: str) -> str | None:
    """Run one check on the first ranks of the default group; what failed, or None."""
    group = subgroup(range(members))
    if group is None:
        return None
    try:
        _ALL[name].fn(group, engine)
    except (AssertionError, RuntimeError) as error:
        return f"rank {rank}: {type(error).__name__}: {error}"
    return None


def _outcomes(
    engine: str, sizes: list[int], names: list[str], no_faults: bool
) -> Iterator[Outcome]:
    timeout_s = _WAITS_OF_A_CHECK * (env.TIMEOUT_S.get() or 0)
    with RankPool(max(sizes), timeout_s=timeout_s) as pool:
        for size in sizes:
            for name in names:
                begin = time.perf_counter()
                failures = _run(pool, name, size, engine)
                seconds = time.perf_counter() - begin
                yield Outcome(label=f"{size} ranks, {name}", failures=failures, seconds=seconds)
    for fault, when in () if no_faults else _FAULTS:
        begin = time.perf_counter()
        failures = []
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "temporary").mkdir()
            program = Program(engine=engine, fault=fault, when=when, folder=Path(folder))
            try:
                expect_survival(program)
            except (AssertionError, OSError) as failure:
                failures = [str(failure)]
        label = f"a rank: {fault} before {when}"
        yield Outcome(label=label, failures=failures, seconds=time.perf_counter() - begin)


def _run(pool: RankPool, name: str, size: int, engine: str) -> list[str]:
    try:
        outcomes = pool.run(run_check, name, size, engine)
    except RankFailure as failure:
        return [
            f"rank {rank}: {error.type_name}: {error.message}"
            for rank, error in failure.errors.items()
        ]
    failures = [outcome for outcome in outcomes if outcome is not None]
    if failures:
        pool.close()  # an error of a GPU stays with its process; the next run starts others
    return failures
