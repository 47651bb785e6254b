"""Control blocks: a wait ends when all have come, or names the rank that never will."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest

from fusco.engines.cpu import control as module
from fusco.engines.cpu.control import Control, Stage
from fusco.engines.cpu.window import Mapping
from fusco.errors import PeerError

RANKS = (0, 1)


@pytest.fixture
def controls() -> Iterator[list[Control]]:
    """Of two ranks in one process, within their first operation; the tests close rank 1's."""
    made = [Control(RANKS, rank, 16, 5.0, [0.0, 0.0]) for rank in RANKS]
    for each in made:
        files = [other.mapping.file for other in made]
        each.connect([Mapping.open(os.getpid(), file) for file in files], [os.getpid()] * 2)
        each.begin()
    yield made
    made[0].close(None)
    for each in made:
        os.close(each.mapping.file)


@pytest.mark.parametrize("lost", [None, 1])
def test_a_rank_that_came_late_and_left_is_not_missed(
    controls: list[Control], lost: int | None
) -> None:
    first, second = controls

    def give_up(*args: object) -> int:
        behind: int = meet(*args)
        second.reach(Stage.DONE)
        second.close(lost)
        return behind

    meet = module.meet
    with mock.patch.object(module, "meet", side_effect=give_up):
        first.meet(Stage.DONE, "combine")


@pytest.mark.parametrize("has_ended", [False, True])
@pytest.mark.parametrize(
    ("lost", "what"),
    [(None, "has closed its Shuffle"), (1, "has left after an error"), (0, "rank 0 is lost")],
)
def test_a_rank_that_left_before_it_came_is_named(
    controls: list[Control], lost: int | None, what: str, has_ended: bool
) -> None:
    first, second = controls
    second.reach(Stage.PUBLISHED)
    second.close(lost)
    ended = mock.patch.object(first._peers[1], "has_ended", return_value=has_ended)
    with ended, pytest.raises(PeerError, match=what):
        first.meet(Stage.DONE, "combine")


def test_a_rank_that_ended_without_a_word_has_died(controls: list[Control]) -> None:
    first, second = controls
    first.reach(Stage.PUBLISHED)
    second.reach(Stage.PUBLISHED)
    ended = mock.patch.object(first._peers[1], "has_ended", return_value=True)
    with ended, pytest.raises(PeerError, match="rank 1 has died"):
        first.wait_all(Stage.DONE, "combine")
    second.close(None)


def test_a_rank_that_was_stopped_itself_looks_again(controls: list[Control]) -> None:
    first, second = controls

    def stop(*args: object) -> int:
        behind: int = meet(*args)
        second.reach(Stage.DONE)
        return behind

    meet = module.meet
    clock = mock.Mock(side_effect=range(0, 1_000_000, 1000))
    late = mock.patch.object(module, "time", SimpleNamespace(monotonic=clock))
    with mock.patch.object(module, "meet", side_effect=stop), late:
        first.meet(Stage.DONE, "combine")
    second.close(None)
