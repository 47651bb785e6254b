"""What `make gpu-test` checks, a test each; skipped, with the reason, where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusco.testing.check import NotApplicable, Verdict
from fusco.testing.conformance import CHECKS
from fusco.testing.gpu.checks import GPU_CHECKS
from fusco.testing.gpu.runner import run_check
from fusco.testing.nodes import emulated_nodes, node_of_rank
from fusco.testing.ranks import RankPool

NAMES = [check.name for check in (*CHECKS, *GPU_CHECKS)]
NAMES_OF_ANY = [check.name for check in (*CHECKS, *GPU_CHECKS) if not check.only]


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_check(pool: RankPool, name: str, num_ranks: int) -> None:
    expect_passed(pool.run(run_check, name, num_ranks, "cuda"))


@pytest.fixture(scope="module", params=[2, 4])
def nodes(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """So many ranks on two emulated nodes."""
    told = emulated_nodes(request.param, 2)
    with RankPool(request.param, device="cuda", environments=told) as ranks:
        yield ranks


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES_OF_ANY)
def test_check_between_nodes(nodes: RankPool, name: str) -> None:
    size = nodes.num_ranks
    expect_passed(nodes.run(run_check, name, size, "two_level", node_of_rank(size, 2)))


def expect_passed(results: list[str | NotApplicable | None]) -> None:
    verdict = Verdict.of(results)
    if verdict.why_skipped:
        pytest.skip(verdict.why_skipped)
    assert not verdict.failures


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", ["random-0", "plans-0", "wide-rows", "tuple-of-four", "held"])
def test_the_checks_are_sound(pool: RankPool, name: str) -> None:
    """They hold for an engine that needs no GPU."""
    assert pool.run(run_check, name, 3, "cpu") == [None] * pool.num_ranks
