"""`fusco selftest`: the conformance checks on this machine and group."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from fusco.cli.failures import FAILURE, short_failures
from fusco.cli.launch import (
    choose_num_ranks,
    is_speaker,
    launched_group,
    launched_ranks,
    leave_launched,
)

if TYPE_CHECKING:
    from fusco.testing.check import Check, NotApplicable, Verdict
    from fusco.testing.ranks import RankPool


CHECK_TIMEOUT_S = "30"


def selftest(
    num_ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ranks to start.", show_default="4, or as many as torchrun started"
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(metavar="NAME", help="Engine to check; all is every one that can run here."),
    ] = "all",
) -> None:
    """Check on this machine that every engine does what it promises, a line a check.

    Starts its own ranks, or runs under torchrun. The exit code is 1 if a check fails.
    """
    with short_failures():
        engines = _engines(engine)
        total = choose_num_ranks("selftest", num_ranks)
        from fusco.testing.ranks import RankPool

        with launched_group():
            if launched_ranks() is not None:
                num_failed = _run_checks(engines, None)
            else:
                with RankPool(total) as pool:
                    num_failed = _run_checks(engines, pool)
    leave_launched(FAILURE if num_failed else 0)
    if num_failed:
        raise typer.Exit(FAILURE)


def run_check(rank: int, name: str, engine: str) -> str | NotApplicable | None:
    """Run one check on this rank of the default group, as `Check.run`."""
    from fusco.env import TIMEOUT_S
    from fusco.testing.conformance import CHECKS

    # Where one rank fails before it has made all of its calls, the others wait no longer.
    os.environ.setdefault(TIMEOUT_S.name, CHECK_TIMEOUT_S)
    check = next(check for check in CHECKS if check.name == name)
    return check.run(None, engine)


def _run_checks(engines: list[str], pool: RankPool | None) -> int:
    from fusco.testing.check import summary
    from fusco.testing.conformance import CHECKS

    num_failed = num_skipped = 0
    for engine in engines:
        for check in CHECKS:
            begin = time.perf_counter()
            verdict = _verdict(check, engine, pool)
            if is_speaker():
                _print_line(check, engine, verdict, time.perf_counter() - begin)
            num_failed += bool(verdict.failures)
            num_skipped += bool(verdict.why_skipped)
    num_run = len(engines) * len(CHECKS) - num_skipped
    if is_speaker():
        typer.echo(summary(num_run - num_failed, num_run, num_skipped))
    return num_failed


def _verdict(check: Check, engine: str, pool: RankPool | None) -> Verdict:
    from fusco.testing.check import Verdict

    if pool is not None:
        return Verdict.in_pool(pool, run_check, check.name, engine)
    import torch.distributed as dist

    results: list[str | NotApplicable | None] = [None] * dist.get_world_size()
    dist.all_gather_object(results, run_check(dist.get_rank(), check.name, engine))
    return Verdict.of(results)


def _print_line(check: Check, engine: str, verdict: Verdict, seconds: float) -> None:
    color = {"FAIL": typer.colors.RED, "skip": typer.colors.YELLOW, "pass": typer.colors.GREEN}
    word = typer.style(verdict.word, fg=color[verdict.word], bold=verdict.word == "FAIL")
    typer.echo(f"{word}  {engine:<9}  {seconds:6.2f} s  {check.name}: {check.description}")
    for line in verdict.lines:
        typer.echo(f"      {line}")


def _engines(wanted: str) -> list[str]:
    from fusco.engines import probe
    from fusco.errors import EngineUnavailableError, input_error

    probed = {found.name: found for found in probe()}
    if wanted == "all":
        return [found.name for found in probed.values() if found.available]
    if wanted not in probed:
        raise input_error(
            "selftest",
            "engine",
            got=repr(wanted),
            expected=f"all, {', '.join(probed)}",
            remedy="choose one of them",
        )
    if not probed[wanted].available:
        raise EngineUnavailableError(
            f"selftest: engine {wanted}: {probed[wanted].reason}; "
            "`fusco doctor` shows what was found"
        )
    return [wanted]
