"""What `make gpu-test` checks, a test each; skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import pytest

from fusco.testing.conformance import CHECKS
from fusco.testing.gpu.checks import GPU_CHECKS
from fusco.testing.gpu.runner import run_check
from fusco.testing.ranks import RankPool

NAMES = [check.name for check in (*CHECKS, *GPU_CHECKS)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_check(pool: RankPool, name: str, num_ranks: int) -> None:
    outcomes = pool.run(run_check, name, num_ranks, "cuda")
    assert outcomes == [None] * pool.num_ranks


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", ["random-0", "plans-0", "wide-rows", "tuple-of-four", "held"])
def test_the_checks_are_sound(pool: RankPool, name: str) -> None:
    """They hold for an engine that needs no GPU."""
    assert pool.run(run_check, name, 3, "cpu") == [None] * pool.num_ranks
