"""Memory that one rank cannot have: every rank raises, and says whose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fusco.engines.cuda.session import Session
from fusco.errors import EngineUnavailableError, WindowMemoryError


class Bulletin:
    """Rank 0's, of two ranks."""

    def __init__(self, **problems: str) -> None:
        self._problems = problems  # rank 1's, by step
        self.said: list[str] = []

    def swap(self, topic: str, text: str, _: float | None = None) -> list[str]:
        self.said.append(text)
        return [text, self._problems.get(topic.rsplit(", ")[-1], "")]


def fail() -> Any:
    raise RuntimeError("no room")


def session(bulletin: Bulletin, *, can_allocate: bool = True, can_map: bool = True) -> Any:
    return SimpleNamespace(
        bulletin=bulletin,
        world=SimpleNamespace(making_timeout_s=1.0),
        _allocate=lambda size: "memory" if can_allocate else fail(),
        _allocator=SimpleNamespace(connect=lambda memory: "mapped" if can_map else fail()),
    )


def test_all_have_it() -> None:
    bulletin = Bulletin()
    assert Session._allocate_everywhere(session(bulletin), "dispatch", "growth 1", 8) == "mapped"
    assert bulletin.said == ["", ""]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("allocated", r"no 8 bytes more .*\(rank 1: full\); free memory"),
        ("mapped", r"not every rank can map .* 8 bytes .*\(rank 1: full\); .*fusco doctor.* peer"),
    ],
)
def test_another_rank_has_no_room(step: str, text: str) -> None:
    bulletin = Bulletin(**{step: "full"})
    with pytest.raises(WindowMemoryError, match=f"dispatch: {text}"):
        Session._allocate_everywhere(session(bulletin), "dispatch", "growth 1", 8)


@pytest.mark.parametrize("fails", ["can_allocate", "can_map"])
def test_this_rank_has_no_room_and_says_so(fails: str) -> None:
    bulletin = Bulletin()
    with pytest.raises(WindowMemoryError, match="rank 0: no room"):
        Session._allocate_everywhere(session(bulletin, **{fails: False}), "dispatch", "growth 1", 8)
    assert bulletin.said[-1] == "no room"


@pytest.mark.parametrize(
    "error", [RuntimeError("no room"), OSError("no room"), KeyError("no room")]
)
def test_what_this_rank_cannot_make_is_told(error: Exception) -> None:
    bulletin = Bulletin()

    def make() -> Any:
        raise error

    with pytest.raises(EngineUnavailableError, match=r"no tables on all ranks \(rank 0: .*no room"):
        Session.make_ready(session(bulletin), "tables", make, "free memory")
    assert "no room" in bulletin.said[-1]


def test_what_another_rank_cannot_make_is_missed() -> None:
    missed = r"rank 1: full\); free memory, or"
    with pytest.raises(EngineUnavailableError, match=missed):
        Session.make_ready(
            session(Bulletin(tables="full")), "tables", lambda: "made", "free memory"
        )
