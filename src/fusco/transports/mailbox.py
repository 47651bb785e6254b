"""Bounded point-to-point messages that say who was waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from fusco.transports.line import line_of, tag_of
from fusco.transports.notices import notices_of

_TAG = 0xF05C


class Mailbox:
    """Swaps CPU tensors of known sizes with the ranks of a group.

    Every wait is for one rank, so an error can name it. gloo sends and receives are used rather
    than collectives for that reason alone.

    Args:
        group: the ranks.
        timeout_s: bound of the wait for a whole swap, seconds.
        wait_s: `[P]`, where to add up the seconds spent waiting for each rank.
        channel: see `tag_of`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout_s: float,
        wait_s: list[float] | None = None,
        channel: int = 0,
    ) -> None:
        self.group = group
        self._channel = channel
        self.line = line_of(group, timeout_s)
        self.timeout_s = timeout_s
        self.wait_s = [0.0] * group.size() if wait_s is None else wait_s
        self.notices = notices_of(group)

    def swap(self, sends: Sequence[Tensor], receives: Sequence[Tensor], *, operation: str) -> None:
        """Send `sends[p]` to rank p and fill `receives[p]` from it; empty ones stay at home.

        Raises:
            PeerError: a rank died, or did not send or take its part within the timeout.
        """
        self.start(sends, receives, operation=operation).wait()

    def start(self, sends: Sequence[Tensor], receives: Sequence[Tensor], *, operation: str) -> Swap:
        """The same without waiting; the tensors are not to be touched before `Swap.wait`."""
        rank, num_ranks = self.group.rank(), self.group.size()
        receives[rank].copy_(sends[rank])
        swap = Swap(self, operation)
        # The next rank first, so that not all ranks send to rank 0 at once.
        peers = [(rank + step) % num_ranks for step in range(1, num_ranks)]
        for peer in peers:
            if receives[peer].numel():
                swap.receive(receives[peer], peer, _TAG)
        for peer in peers:
            if sends[peer].numel():
                swap.send(sends[peer], peer, _TAG)
        return swap

    def tag(self, kind: int) -> int:
        """Of messages of a kind, below 2**16."""
        return tag_of(kind, self._channel)

    def share(self, mine: Tensor, among: Sequence[int], *, operation: str) -> Tensor:
        """What each of the ranks `among`, this one too, shares: `[len(among), n]`, in that order.

        Args:
            mine: `[n]`.
            among: ranks of the group that all call this.
            operation: what to call it in errors.
        """
        gathered = mine.new_empty(len(among), mine.shape[0])
        nothing = [mine.new_empty(0)] * self.group.size()
        sends, receives = list(nothing), list(nothing)
        for place, peer in enumerate(among):
            sends[peer], receives[peer] = mine, gathered[place]
        self.swap(sends, receives, operation=operation)
        return gathered


class Swap:
    """Messages under way. A wait, or a message that cannot be begun, raises PeerError."""

    def __init__(self, mailbox: Mailbox, operation: str) -> None:
        self._mailbox = mailbox
        self._operation = operation
        # With their tensors, which a message under way does not keep alive.
        self._works: list[tuple[int, dist.Work, Tensor]] = []

    def receive(self, tensor: Tensor, peer: int, tag: int) -> None:
        """Begin to fill a tensor from a rank."""
        try:
            work = self._mailbox.line.recv([tensor], peer, self._mailbox.tag(tag))
        except RuntimeError as error:
            raise self._error(peer, is_late=False) from error
        self._works.append((peer, work, tensor))

    def send(self, tensor: Tensor, peer: int, tag: int) -> None:
        """Begin to send a tensor to a rank."""
        try:
            work = self._mailbox.line.send([tensor], peer, self._mailbox.tag(tag))
        except RuntimeError as error:
            raise self._error(peer, is_late=False) from error
        self._works.append((peer, work, tensor))

    def wait(self) -> None:
        """Until everything has come and gone.

        Raises:
            PeerError: a rank died, or was late.
        """
        # From here on: what was begun long before may not have been sent yet.
        deadline = time.monotonic() + self._mailbox.timeout_s
        for peer, work, _ in self._works:
            start = time.monotonic()
            try:
                work.wait(timeout=timedelta(seconds=max(deadline - start, 0.001)))
            except RuntimeError as error:
                raise self._error(peer, is_late=time.monotonic() >= deadline) from error
            self._mailbox.wait_s[peer] += time.monotonic() - start
        self._works.clear()

    def _error(self, peer: int, *, is_late: bool) -> Exception:
        mailbox = self._mailbox
        return mailbox.notices.error(self._operation, peer, mailbox.timeout_s, is_late=is_late)
