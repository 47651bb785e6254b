"""Bounded point-to-point messages that say who was waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from fusco.errors import PeerError

_TAG = 0xF05C


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
            raise PeerError(
                f"{operation}: rank {waited_for} {what} (waited for by rank {rank}); "
                "this Shuffle is closed for good, restart the ranks",
                operation=operation,
                rank=waited_for,
            ) from error

    def _receive(self, tensor: Tensor, peer: int) -> dist.Work:
        work = dist.irecv(tensor, group=self.group, group_src=peer, tag=_TAG)
        assert work is not None, "this rank is a member of its group"
        return work

    def _send(self, tensor: Tensor, peer: int) -> dist.Work:
        work = dist.isend(tensor, group=self.group, group_dst=peer, tag=_TAG)
        assert work is not None, "this rank is a member of its group"
        return work
