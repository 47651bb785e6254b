"""Whom to name when a rank does not answer: often it left because it lost another."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from fusco.errors import PeerError
from fusco.transports.line import LINES, Line, line_of

_TAG = 0xF05D
_NOBODY = -1
_TELL_S = 1.0
_GRACE_S = 0.25
"""How long a rank waits to hear whom the rank that it misses has missed itself."""
_HANG_UP = timedelta(milliseconds=1)


class Notices:
    """Who was lost, told by ranks that leave because of it.

    A rank that raises and ends looks dead to those that wait for it next. So it tells them first;
    the messages are expected from the start, since a closed connection takes no new ones.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        # What is kept with a group must not hold it.
        self._group = weakref.ref(group)
        self._rank = group.rank()
        self._has_told = False
        line = line_of(group)
        self._told = torch.full((group.size(), 1), _NOBODY, device="cpu")
        self._works = [
            line.recv([self._told[peer]], peer, _TAG)
            for peer in range(group.size())
            if peer != self._rank
        ]

    @property
    def has_lost(self) -> bool:
        """Whether some rank has told that one was lost."""
        return bool((self._told != _NOBODY).any())

    def error(self, operation: str, missed: int, timeout_s: float, *, is_late: bool) -> PeerError:
        """The error to raise where `missed` did not answer; all others are told of it.

        Args:
            operation: what was running.
            missed: the rank that was waited for.
            timeout_s: how long, at most.
            is_late: whether that time has passed; else its connection has ended.
        """
        what = f"did not arrive within {timeout_s:g} s" if is_late else "is gone"
        if is_late:
            self.tell(missed)
        lost, teller = self._blame(missed)
        # Time is up for all that wait for each other at nearly the same moment.
        deadline = time.monotonic() + _GRACE_S
        while self._told[lost] == _NOBODY and time.monotonic() < deadline:
            time.sleep(_GRACE_S / 50)
            lost, teller = self._blame(missed)
        if lost == teller:
            what = "has left after an error of its own"
        elif lost != missed:
            what = f"is lost, as rank {teller} has found"
        self.tell(lost)
        return PeerError(
            f"{operation}: rank {lost} {what} (waited for by rank {self._rank}); "
            "the group cannot go on without it, restart the ranks",
            operation=operation,
            rank=lost,
        )

    def _blame(self, missed: int) -> tuple[int, int | None]:
        """Who is lost as far as is known, and which rank has told of that, if any."""
        told = self._told.flatten().tolist()
        lost, teller = missed, None
        if told[missed] == _NOBODY:
            teller = next((p for p, of in enumerate(told) if of not in (_NOBODY, self._rank)), None)
            lost = missed if teller is None else told[teller]
        # Who is waited for may itself wait for another, and that one too.
        for _ in told:
            if told[lost] in (_NOBODY, self._rank) or lost == teller:
                break
            lost, teller = told[lost], lost
        return lost, teller

    def tell(self, lost: int) -> None:
        """Tell all others, once, as far as they can still be reached."""
        line = self._line()
        if self._has_told or line is None:
            return
        self._has_told = True
        message = torch.tensor([lost], device="cpu")
        for peer in range(line.size()):
            if peer in (lost, self._rank):
                continue
            # Whoever cannot be reached has left already, and knows.
            with contextlib.suppress(RuntimeError):
                work = line.send([message], peer, _TAG)
                work.wait(timeout=timedelta(seconds=_TELL_S))

    def hang_up(self) -> None:
        """End this rank's connections, so that nobody waits for it any more. Who was told of a
        lost rank finds that out only when a wait ends."""
        # Once it has ended what still arrives resets a connection, and loses what was told.
        time.sleep(_GRACE_S)
        for work in self._works:
            # NOTE: a wait that times out is the one thing that makes gloo close connections.
            with contextlib.suppress(RuntimeError):
                work.wait(timeout=_HANG_UP)

    def _line(self) -> Line | None:
        group = self._group()
        return None if group is None else line_of(group)


def notices_of(group: dist.ProcessGroup) -> Notices:
    """The notices of a group, expected from the first call on."""
    if group not in _NOTICES:
        _NOTICES[group] = Notices(group)
    return _NOTICES[group]


def forget_notices() -> None:
    """Expect no notices any more, before groups are destroyed."""
    _NOTICES.clear()
    LINES.clear()


_NOTICES: MutableMapping[dist.ProcessGroup, Notices] = weakref.WeakKeyDictionary()
