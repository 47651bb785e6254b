"""The checks that users run are sound: they pass here, on groups of every kind."""

from __future__ import annotations

from contextlib import suppress

import pytest

from fusco.testing.check import NotApplicable
from fusco.testing.conformance import CHECKS
from fusco.testing.ranks import RankPool, subgroup


def run_checks(rank: int, members: tuple[int, ...], engine: str) -> int:
    group = subgroup(members)
    if group is not None:
        for check in CHECKS:
            with suppress(NotApplicable):
                check.fn(group, engine)
    return len(CHECKS)


@pytest.mark.parametrize("members", [(0,), (5, 6, 7), (0, 1, 2, 3)], ids=len)
def test_checks_pass(pool: RankPool, engine: str, members: tuple[int, ...]) -> None:
    assert pool.run(run_checks, members, engine) == [len(CHECKS)] * 8


def test_names_are_unique() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
