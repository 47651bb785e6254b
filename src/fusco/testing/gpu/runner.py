"""`python -m fusco.testing.gpu`: every check of an engine for GPUs, a line each, on shared GPUs.

Needs torch, numpy and cuda-core, and at least one GPU; ranks share GPUs where there are fewer. All
of it runs with bulk copies, and on one number of ranks again with the 16-byte loads and stores of
GPUs before Hopper. With `--nodes 2 --ranks 2,4` ranks are told that they are on two nodes, which
NCCL joins by sockets.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fusco import env
from fusco.machine import append_jsonl, circumstances
from fusco.testing.cases import tell_nodes
from fusco.testing.check import NotApplicable, Verdict, summary
from fusco.testing.conformance import CHECKS
from fusco.testing.faults import Program, expect_survival
from fusco.testing.gpu.checks import GPU_CHECKS
from fusco.testing.nodes import emulated_nodes, node_of_rank
from fusco.testing.ranks import RankPool, subgroup

_ALL = {check.name: check for check in (*CHECKS, *GPU_CHECKS)}
_FAULTS = (("kill", "combine"), ("exit", "dispatch"), ("stop", "backward"), ("idle", "combine"))
_BULK_COPIES = {"bulk": "1", "plain": "0"}
_PLAIN_RANKS = 2
_TIMEOUT_S = "30"
_WAITS_OF_A_CHECK = 8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a check."""

    label: str
    verdict: Verdict
    seconds: float


def main() -> int:
    """Run, print, record, and count what failed."""
    parser = argparse.ArgumentParser(
        prog="python -m fusco.testing.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--engine", help='"cuda", or with --nodes "two_level"')
    parser.add_argument("--nodes", type=int, help="nodes to emulate, each with a GPU a rank")
    parser.add_argument(
        "--ranks", default="1,2,3,4,8", help="sizes of groups, by comma (default: %(default)s)"
    )
    parser.add_argument(
        "--copies",
        choices=("both", *_BULK_COPIES),
        default="both",
        help="both: bulk, then plain ones on one size of group, 2 where it is among them",
    )
    parser.add_argument("--only", default="", help="names of checks, or parts of them, by comma")
    parser.add_argument("--no-faults", action="store_true", help="end no rank on purpose")
    parser.add_argument("--output", type=Path, help="append a record here, as a JSON line")
    parser.add_argument("--tool", help="under which this runs, for the record")
    parser.add_argument("--commit", help="what the record says instead of what git says here")
    arguments = parser.parse_args()
    # A check that fails on one rank must not hold up the others for long.
    os.environ.setdefault(env.TIMEOUT_S.name, _TIMEOUT_S)
    sizes = [int(size) for size in arguments.ranks.split(",")]
    # Between nodes operators of torch move the rows.
    rounds = _rounds(arguments.copies if arguments.nodes is None else "bulk", sizes)
    wanted = [part for part in arguments.only.split(",") if part]
    engine = arguments.engine or ("cuda" if arguments.nodes is None else "two_level")
    if not _has_gpus(engine):
        parser.error("torch finds no CUDA device; run this on a machine with GPUs")
    if arguments.nodes is not None:
        _check_nodes(parser, arguments.nodes, sizes)
    known = [check.name for check in _ALL.values() if check.only in ("", engine)]
    names = [name for name in known if not wanted or any(part in name for part in wanted)]
    for part in wanted:
        if not any(part in name for name in known):
            parser.error(f"no check of {engine!r} has {part!r} in its name: {', '.join(known)}")
    no_faults = arguments.no_faults or bool(wanted)
    num_run, failed, skipped, began = 0, [], [], time.monotonic()
    for outcome in _outcomes(engine, rounds, names, arguments.nodes, no_faults=no_faults):
        verdict = outcome.verdict
        print(f"{verdict.word}  {outcome.seconds:6.2f} s  {outcome.label}", flush=True)
        for line in verdict.lines:
            print(f"      {line}", flush=True)
        num_run += not verdict.why_skipped
        failed += [outcome.label] if verdict.failures else []
        skipped += [outcome.label] if verdict.why_skipped else []
    num_passed = num_run - len(failed)
    print(summary(num_passed, num_run, len(skipped)))
    if arguments.output is not None:
        record = {
            "checks": num_run,
            "passed": num_passed,
            "failed": failed,
            "skipped": skipped,
            "engine": engine,
            "nodes": arguments.nodes,
            "ranks_by_copies": rounds,
            "only": wanted,
            "has_faults": not no_faults,
            "tool": arguments.tool,
            "seconds": round(time.monotonic() - began, 1),
            **circumstances("cuda" if torch.cuda.is_available() else "cpu", arguments.commit),
        }
        append_jsonl(arguments.output, [record])
    return int(bool(failed) or num_run == 0)


def _has_gpus(engine: str) -> bool:
    return engine not in ("cuda", "two_level") or torch.cuda.is_available()


def _check_nodes(parser: argparse.ArgumentParser, num_nodes: int, sizes: Sequence[int]) -> None:
    num_gpus = torch.cuda.device_count()
    for size in sizes:
        need = -(-size // num_nodes)
        if need > num_gpus:
            parser.error(
                f"{size} ranks on {num_nodes} nodes need {need} GPUs, for ranks of a node cannot "
                f"share one by NCCL, and torch finds {num_gpus}: give fewer --ranks"
            )


def _rounds(copies: str, sizes: list[int]) -> dict[str, list[int]]:
    """Sizes of groups, by how rows are copied."""
    if copies != "both":
        return {copies: sizes}
    return {"bulk": sizes, "plain": [_PLAIN_RANKS if _PLAIN_RANKS in sizes else sizes[0]]}


def run_check(
    rank: int, name: str, members: int, engine: str, nodes: tuple[int, ...] = ()
) -> str | NotApplicable | None:
    """Run one check on the first ranks of the default group, as `Check.run`; None on the others.

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
    return None if group is None else _ALL[name].run(group, engine)


def _outcomes(
    engine: str,
    rounds: dict[str, list[int]],
    names: list[str],
    num_nodes: int | None,
    *,
    no_faults: bool,
) -> Iterator[Outcome]:
    for copies, sizes in rounds.items():
        # Ranks are started with it, by the pool and by those that are to end.
        os.environ[env.BULK_COPIES.name] = _BULK_COPIES[copies]
        yield from _checks(engine, copies, sizes, names, num_nodes)
        if copies == next(iter(rounds)) and not no_faults:
            yield from _faults(engine, num_nodes)


def _checks(
    engine: str, copies: str, sizes: list[int], names: list[str], num_nodes: int | None
) -> Iterator[Outcome]:
    timeout_s = _WAITS_OF_A_CHECK * (env.TIMEOUT_S.get() or 0)
    how = "" if copies == "bulk" else f", {copies} copies"
    if num_nodes is None:
        with RankPool(max(sizes), timeout_s=timeout_s) as pool:
            for size in sizes:
                yield from _check_all(pool, names, size, engine, (), f"{size} ranks{how}")
    else:
        for size in sizes:
            nodes, told = node_of_rank(size, num_nodes), emulated_nodes(size, num_nodes)
            where = f"{size} ranks on {len(set(nodes))} nodes{how}"
            with RankPool(size, device="cuda", environments=told, timeout_s=timeout_s) as pool:
                yield from _check_all(pool, names, size, engine, nodes, where)


def _check_all(
    pool: RankPool,
    names: Sequence[str],
    size: int,
    engine: str,
    nodes: tuple[int, ...],
    where: str,
) -> Iterator[Outcome]:
    for name in names:
        begin = time.perf_counter()
        verdict = _run(pool, name, size, engine, nodes)
        seconds = time.perf_counter() - begin
        yield Outcome(label=f"{where}, {name}", verdict=verdict, seconds=seconds)


def _run(pool: RankPool, name: str, size: int, engine: str, nodes: tuple[int, ...]) -> Verdict:
    verdict = Verdict.in_pool(pool, run_check, name, size, engine, nodes)
    if verdict.failures:
        pool.close()  # an error of a GPU stays with its process; the next run starts others
    return verdict


def _faults(engine: str, num_nodes: int | None) -> Iterator[Outcome]:
    for fault, when in _FAULTS:
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
        verdict = Verdict(failures=failures)
        yield Outcome(label=label, verdict=verdict, seconds=time.perf_counter() - begin)
