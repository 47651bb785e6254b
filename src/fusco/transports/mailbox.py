"""Bounded point-to-point messages that say who was waited for."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.errors import PeerError

_TAG = 0xF05C
_NOTICE_TAG = 0xF05D
_NOBODY = -1
_TELL_S = 1.0


class Mailbox:
    """Swaps tensors of known sizes with the ranks of a group.

    Every wait is for one rank, so an error can name it. gloo sends and receives are used rather
    than collectives for that reason alone.

    Args:
        group: the ranks.
        timeout_s: bound of a whole swap, seconds.
        wait_s: `[P]`, where to add up the seconds spent waiting for each rank.
    """

    def __init__(
        self, group: dist.ProcessGroup, timeout_s: float, wait_s: list[float] | None = None
    ) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self.wait_s = [0.0] * group.size() if wait_s is None else wait_s
        self._notices = _notices(group)

    def swap(self, sends: Sequence[Tensor], receives: Sequence[Tensor], *, operation: str) -> None:
        """Send `sends[p]` to rank p and fill `receives[p]` from it; empty ones stay at home.

        Raises:
            PeerError: a rank died, or did not send or take its part within the timeout.
        """
        rank = self.group.rank()
        receives[rank].copy_(sends[rank])
        peers = [p for p in range(self.group.size()) if p != rank]
        works: list[tuple[int, dist.Work]] = []
        deadline = time.monotonic() + self.timeout_s
        waited_for = rank
        # The next rank first, so that not all ranks send to rank 0 at once.
        peers = peers[rank:] + peers[:rank]
        try:
            for waited_for in peers:
                if receives[waited_for].numel():
                    works.append((waited_for, self._receive(receives[waited_for], waited_for)))
            for waited_for in peers:
                if sends[waited_for].numel():
                    works.append((waited_for, self._send(sends[waited_for], waited_for)))
            for waited_for, work in works:
                start = time.monotonic()
                work.wait(timeout=timedelta(seconds=max(deadline - start, 0.001)))
                self.wait_s[waited_for] += time.monotonic() - start
        except RuntimeError as error:
            late = time.monotonic() >= deadline
            what = f"did not arrive within {self.timeout_s:g} s" if late else "is gone"
            lost = self._notices.blame(waited_for)
            if lost != waited_for:
                what = f"is lost, as rank {waited_for} has found"
            self._notices.tell(lost)
            raise PeerError(
                f"{operation}: rank {lost} {what} (waited for by rank {rank}); "
                "this Shuffle is closed for good, restart the ranks",
                operation=operation,
                rank=lost,
            ) from error

    def _receive(self, tensor: Tensor, peer: int) -> dist.Work:
        work = dist.irecv(tensor, group=self.group, group_src=peer, tag=_TAG)
        assert work is not None, "this rank is a member of its group"
        return work

    def _send(self, tensor: Tensor, peer: int) -> dist.Work:
        work = dist.isend(tensor, group=self.group, group_dst=peer, tag=_TAG)
        assert work is not None, "this rank is a member of its group"
        return work


class _Notices:
    """Who was lost, told by ranks that leave because of it.

    A rank that raises and ends looks dead to those that wait for it next. So it tells them first;
    the messages are expected from the start, since a closed connection takes no new ones.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._told = torch.full((group.size(), 1), _NOBODY)
        self._works = [
            dist.irecv(self._told[peer], group=group, group_src=peer, tag=_NOTICE_TAG)
            for peer in range(group.size())
            if peer != group.rank()
        ]

    def blame(self, rank: int) -> int:
        """The rank that was lost first, where `rank` is missed."""
        told = int(self._told[rank])
        return rank if told == _NOBODY else told

    def tell(self, lost: int) -> None:
        """Tell all others, as far as they can still be reached."""
        message = torch.tensor([lost])
        for peer in range(self._group.size()):
            if peer in (lost, self._group.rank()):
                continue
            # Whoever cannot be reached has left already, and knows.
            with contextlib.suppress(RuntimeError):
                work = dist.isend(message, group=self._group, group_dst=peer, tag=_NOTICE_TAG)
                assert work is not None, "this rank is a member of its group"
                work.wait(timeout=timedelta(seconds=_TELL_S))


@functools.cache
def _notices(group: dist.ProcessGroup) -> _Notices:
    return _Notices(group)
