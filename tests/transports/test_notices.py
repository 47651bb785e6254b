"""Whom a rank names when another does not answer."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fusco.transports import notices
from fusco.transports.notices import Notices


@pytest.fixture(autouse=True)
def short_grace() -> object:
    with mock.patch.object(notices, "_GRACE_S", 0.05):
        yield


def notices_of_rank(rank: int, told: dict[int, int]) -> Notices:
    """Of one of five ranks, some of which have told whom they miss."""
    made = object.__new__(Notices)
    made._rank, made._has_told = rank, False
    made._told = torch.full((5, 1), -1)
    for peer, lost in told.items():
        made._told[peer] = lost
    return made


def named(rank: int, told: dict[int, int], missed: int) -> tuple[int, str]:
    with mock.patch.object(Notices, "tell"):
        error = notices_of_rank(rank, told).error("combine", missed, 3.0, is_late=True)
    assert error.rank is not None
    return error.rank, str(error)


@pytest.mark.parametrize(
    ("rank", "told", "missed", "lost", "what"),
    [
        (3, {}, 4, 4, "rank 4 did not arrive within 3 s"),
        (3, {4: 2}, 4, 2, "rank 2 is lost, as rank 4 has found"),
        (0, {3: 4, 4: 2}, 3, 2, "rank 2 is lost, as rank 4 has found"),
        (0, {3: 4, 4: 2}, 1, 2, "rank 2 is lost, as rank 4 has found"),
        (0, {1: 1}, 1, 1, "rank 1 has left after an error of its own"),
        (0, {3: 4}, 1, 4, "rank 4 is lost, as rank 3 has found"),
        # Ranks that miss this one say nothing about others.
        (2, {4: 2}, 0, 0, "rank 0 did not arrive"),
        (2, {4: 2}, 4, 4, "rank 4 did not arrive"),
    ],
)
def test_the_end_of_the_chain_is_named(
    rank: int, told: dict[int, int], missed: int, lost: int, what: str
) -> None:
    found, text = named(rank, told, missed)
    assert found == lost
    assert what in text


def test_ranks_that_miss_each_other_name_one_of_them() -> None:
    found, _ = named(0, {3: 4, 4: 3}, 3)
    assert found in (3, 4)


def test_what_arrives_a_moment_later_counts() -> None:
    with mock.patch.object(Notices, "tell"), mock.patch.object(notices.time, "sleep") as sleep:
        late = notices_of_rank(3, {})
        sleep.side_effect = lambda _: late._told[4].fill_(2)
        assert late.error("combine", 4, 3.0, is_late=True).rank == 2
