"""Whom to name when a rank does not answer: often it left because it lost another."""

from __future__ import annotations

import contextlib
import functools
from datetime import timedelta

import torch
import torch.distributed as dist

from fusco.errors import PeerError
from fusco.transports.line import line_of

_TAG = 0xF05D
_NOBODY = -1
_TELL_S = 1.0


class Notices:
    """Who was lost, told by ranks that leave because of it.

    A rank that raises and ends looks dead to those that wait for it next. So it tells them first;
    the messages are expected from the start, since a closed connection takes no new ones.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._line = line = line_of(group)
        self._has_told = False
        self._told = torch.full((group.size(), 1), _NOBODY)
        self._works = [
            line.recv([self._told[peer]], peer, _TAG)
            for peer in range(line.size())
            if peer != line.rank()
        ]

    def error(self, operation: str, missed: int, timeout_s: float, *, is_late: bool) -> PeerError:
        """The error to raise where `missed` did not answer; all others are told of it.

        Args:
            operation: what was running.
            missed: the rank that was waited for.
            timeout_s: how long, at most.
            is_late: whether that time has passed; else its connection has ended.
        """
        what = f"did not arrive within {timeout_s:g} s" if is_late else "is gone"
        told = int(self._told[missed])
        lost = missed if told == _NOBODY else told
        if lost != missed:
            what = f"is lost, as rank {missed} has found"
        self.tell(lost)
        return PeerError(
            f"{operation}: rank {lost} {what} (waited for by rank {self._line.rank()}); "
            "this Shuffle is closed for good, restart the ranks",
            operation=operation,
            rank=lost,
        )

    def tell(self, lost: int) -> None:
        """Tell all others, once, as far as they can still be reached."""
        if self._has_told:
            return
        self._has_told = True
        message = torch.tensor([lost])
        for peer in range(self._line.size()):
            if peer in (lost, self._line.rank()):
                continue
            # Whoever cannot be reached has left already, and knows.
            with contextlib.suppress(RuntimeError):
                work = self._line.send([message], peer, _TAG)
                work.wait(timeout=timedelta(seconds=_TELL_S))


@functools.cache
def notices_of(group: dist.ProcessGroup) -> Notices:
    """The notices of a group, expected from the first call on."""
    return Notices(group)


def forget_notices() -> None:
    """Expect no notices any more, before groups are destroyed."""
    notices_of.cache_clear()
    line_of.cache_clear()
