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
    from fusco.testing.conformance import Check
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


def run_check(rank: int, name: str, engine: str) -> str | None:
    """Run one check on this rank of the default group; what failed, or None."""
    from fusco.env import TIMEOUT_S
    from fusco.testing.conformance import CHECKS

    # Where one rank fails before it has made all of its calls, the others wait no longer.
    os.environ.setdefault(TIMEOUT_S.name, CHECK_TIMEOUT_S)
    check = next(check for check in CHECKS if check.name == name)
    try:
        check.fn(None, engine)
    except (AssertionError, RuntimeError) as error:
        return f"rank {rank}: {type(error).__name__}: {error}"
    return None


def _run_checks(engines: list[str], pool: RankPool | None) -> int:
    from fusco.testing.conformance import CHECKS

    num_failed = 0
    for engine in engines:
        for check in CHECKS:
            begin = time.perf_counter()
            failures = _outcome(check, engine, pool)
            if is_speaker():
                _print_line(check, engine, failures, time.perf_counter() - begin)
            num_failed += bool(failures)
    num_checks = len(engines) * len(CHECKS)
    if is_speaker():
        typer.echo(f"{num_checks - num_failed} of {num_checks} checks passed")
    return num_failed


def _outcome(check: Check, engine: str, pool: RankPool | None) -> list[str]:
    """What failed, on any rank."""
    from fusco.testing.ranks import RankFailure

    if pool is not None:
        try:
            outcomes = pool.run(run_check, check.name, engine)
        except RankFailure as failure:
            return [
                f"rank {rank}: {error.type_name}: {error.message}"
                for rank, error in failure.errors.items()
            ]
    else:
        import torch.distributed as dist

        outcomes = [None] * dist.get_world_size()
        mine = run_check(dist.get_rank(), check.name, engine)
        dist.all_gather_object(outcomes, mine)
    return [outcome for outcome in outcomes if outcome is not None]


def _print_line(check: Check, engine: str, failures: list[str], seconds: float) -> None:
    verdict = (
        typer.style("FAIL", fg=typer.colors.RED, bold=True)
        if failures
        else typer.style("pass", fg=typer.colors.GREEN)
    )
    typer.echo(f"{verdict}  {engine:<9}  {seconds:6.2f} s  {check.name}: {check.description}")
    for failure in failures:
        typer.echo(f"      {failure}")


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
        raise EngineUnavailableError(f"selftest: engine {wanted}: {probed[wanted].reason}")
    return [wanted]
