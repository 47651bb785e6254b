"""How far ranks have come within an operation, told by messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusco.transports.mailbox import Mailbox, Swap

_TAG = 0xF05F
_DONE = 1 << 30


class Progress:
    """Steps of one operation, which ranks reach in order and wait for.

    Args:
        mailbox: between the ranks.
        mates: the others that take part.
        operation: what to call it in errors.
    """

    def __init__(self, mailbox: Mailbox, mates: Sequence[int], operation: str) -> None:
        self._mailbox = mailbox
        self._operation = operation
        self._come_to = dict.fromkeys(mates, -1)
        self._telling = Swap(mailbox, operation)

    def reach(self, step: int) -> None:
        """Tell the others; does not wait."""
        for mate in self._come_to:
            self._telling.send(torch.tensor([step], device="cpu"), mate, _TAG)

    def wait(self, step: int) -> None:
        """Until all others have come to a step, or finished.

        Raises:
            PeerError: one died, or did not come in time.
        """
        for mate in self._come_to:
            while self._come_to[mate] < step:
                told = torch.empty(1, dtype=torch.int64, device="cpu")
                hearing = Swap(self._mailbox, self._operation)
                hearing.receive(told, mate, _TAG)
                hearing.wait()
                self._come_to[mate] = int(told)

    def finish(self) -> None:
        """Until all have finished."""
        self.reach(_DONE)
        self.wait(_DONE)
        self._telling.wait()
