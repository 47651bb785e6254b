"""`all_to_all_single` that counts what it sends."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class CountedAllToAll:
    """Swaps rows between the ranks of a group.

    Attributes:
        wire_bytes: what this rank has sent to others so far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.wire_bytes = 0

    def __call__(
        self,
        received: Tensor,
        sent: Tensor,
        received_splits: list[int] | None = None,
        sent_splits: list[int] | None = None,
    ) -> None:
        """Arguments as `torch.distributed.all_to_all_single` takes them."""
        dist.all_to_all_single(received, sent, received_splits, sent_splits, group=self._group)
        rank, num_ranks = self._group.rank(), self._group.size()
        own = sent_splits[rank] if sent_splits else len(sent) // num_ranks
        self.wire_bytes += (len(sent) - own) * sent[:1].nbytes
