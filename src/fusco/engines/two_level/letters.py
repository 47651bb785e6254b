"""What ranks tell forwarders of the rows they send them, behind the first slices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusco.transports.mailbox import Mailbox, Swap

_TAG = 0xF05B


class Letters:
    """Messages to and from other ranks, expected long before they are sent.

    A message leaves when its receiver has said that it expects it. Said before the slices are sent,
    that word does not have to travel behind the slices going the same way.

    Args:
        mailbox: of this rank.
        receives: by rank, what to fill; empty where nothing comes.
        operation: what to call it in errors.
    """

    def __init__(self, mailbox: Mailbox, receives: Sequence[Tensor], operation: str) -> None:
        self._swap = Swap(mailbox, operation)
        for peer, tensor in enumerate(receives):
            if tensor.numel():
                self._swap.receive(tensor, peer, _TAG)

    def send(self, sends: Sequence[Tensor]) -> None:
        """Send `sends[p]` to rank p; empty ones stay at home."""
        for peer, tensor in enumerate(sends):
            if tensor.numel():
                self._swap.send(tensor, peer, _TAG)

    def wait(self) -> None:
        """Until all have come and gone; raises PeerError where a rank died, or was late."""
        self._swap.wait()
