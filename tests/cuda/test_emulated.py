"""What `make gpu-test` checks, with kernels that are emulated: all that the host does."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from emulator import emulated

import fusco
from fusco.engines.cuda.session import Session
from fusco.testing.cases import Case, draw, expect_round_trip
from fusco.testing.check import NotApplicable, Verdict
from fusco.testing.conformance import CHECKS
from fusco.testing.gpu.checks import GPU_CHECKS
from fusco.testing.gpu.runner import run_check
from fusco.testing.ranks import RankPool, subgroup

# Rows of bytes need not be units of 16 there, and the others are of no Shuffle, or of GPUs alone.
NOT_THESE = {"bytes", "exchange", "nccl-group", "gpu-mistakes"}
NAMES = [each.name for each in (*CHECKS, *GPU_CHECKS) if each.name not in NOT_THESE]
IN_STEP = (
    *("gradients", "compiled", "strided", "overflow", "graphs-overflow", "inference"),
    "again-wide",
)
"""Computing with what has arrived, which does not wait for it on a CPU; and reports that are there
at once."""


def check(rank: int, name: str, num_ranks: int, folder: Path) -> str | NotApplicable | None:
    if subgroup(range(num_ranks)) is None:
        return None
    with emulated(folder, in_step=name.startswith(IN_STEP)):
        return run_check(rank, name, num_ranks, "reference")


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_emulated(pool: RankPool, name: str, num_ranks: int, tmp_path: Path) -> None:
    verdict = Verdict.of(pool.run(check, name, num_ranks, tmp_path))
    if verdict.why_skipped:
        pytest.skip(verdict.why_skipped)
    assert not verdict.failures


def make_without(rank: int, folder: Path, what: str, remedy: str) -> None:
    """A rank cannot make what all need, and then it can."""
    group = subgroup(range(3))
    if group is None:
        return
    case = Case(num_tokens=(3, 4, 2), hidden_size=8, num_experts=6)

    def fail(*_: object) -> None:
        raise OSError("there is none")

    with emulated(folder, in_step=False):
        without = mock.patch.object(Session, what, fail) if rank == 1 else nullcontext()
        expected = pytest.raises(
            fusco.EngineUnavailableError, match=f"rank 1: there is none.*{remedy}"
        )
        with without, expected:
            case.shuffle(group, "reference")
        with case.shuffle(group, "reference") as shuffle:
            expect_round_trip(shuffle, draw(case), rank)


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("_make_tables", "free memory"),
        ("launcher", "fusco warmup"),
        ("launchers", "fusco warmup"),
    ],
)
def test_what_a_rank_cannot_make_is_missed_by_all(
    pool: RankPool, what: str, remedy: str, tmp_path: Path
) -> None:
    pool.run(make_without, tmp_path, what, remedy)


def lose_the_last(rank: int, folder: Path, *, has_failed: bool) -> str:
    """What a rank is told when another stops, maybe after calls that did not fit together."""
    group = subgroup(range(3))
    if group is None:
        return ""
    case = Case(num_tokens=(3, 4, 2), hidden_size=8, num_experts=6)
    inputs = draw(case)
    with (
        emulated(folder, in_step=False),
        case.shuffle(group, "reference", timeout_s=5.0) as shuffle,
    ):
        weights = inputs.weights_of(rank)
        for _ in range(3):  # from then on on the fast path
            d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], weights)
            shuffle.combine(inputs.outputs[rank], d)
        if has_failed:
            dtype = torch.float16 if rank == 2 else torch.float32
            shuffle.combine(inputs.outputs[rank].to(dtype), d)
        if rank == 2:
            return ""
        with pytest.raises(fusco.PeerError) as caught:
            shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], weights)
        with pytest.raises(fusco.ClosedError):
            shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], weights)
    return str(caught.value)


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_loss_is_for_good(pool: RankPool, has_failed: bool, tmp_path: Path) -> None:
    told = pool.run(partial(lose_the_last, has_failed=has_failed), tmp_path)
    assert all("rank 2 is lost" in each for each in told[:2]), told
