"""Short texts between ranks through the group's store, whatever its backend can send."""

from __future__ import annotations

import itertools
from collections.abc import MutableMapping
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from fusco.errors import PeerError


class Bulletin:
    """Texts that every rank of a group posts under a topic and all read.

    For what is rare and small, such as errors: a store is slow, but it needs neither a device nor
    a collective.

    Args:
        group: the ranks. All make their bulletins in the same order.
        timeout_s: bound of every wait, seconds.
        part: names those who share it, where each part of the group has one of its own.

    Attributes:
        name: the same on all ranks that share it, and no other bulletin of the group has it.
        store: where the texts are.
        group_name: the group's own name in this process.
        timeout_s: as above.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, part: str = "") -> None:
        # NOTE: torch offers no public way to a group's store.
        self.store = _get_process_group_store(group)
        self.group_name: str = group.group_name
        number = next(_numbers.setdefault(group, itertools.count()))
        self.name = f"fusco/{number}{part and '/'}{part}"
        self._rank, self._num_ranks = group.rank(), group.size()
        self.timeout_s = timeout_s

    def post(self, topic: str, text: str) -> None:
        """Tell the others; does not wait."""
        # Not all stores take an empty text.
        self.store.set(self._key(topic, self._rank), f"{text}.")

    def read(self, topic: str, rank: int, timeout_s: float | None = None) -> str:
        """What a rank has posted.

        Args:
            topic: under which.
            rank: of the group.
            timeout_s: bound of this wait, seconds; None: that of every other.

        Raises:
            PeerError: it did not post in time.
        """
        key = self._key(topic, rank)
        timeout_s = timeout_s or self.timeout_s
        try:
            self.store.wait([key], timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise PeerError(
                f"{topic}: rank {rank} did not answer within {timeout_s:g} s "
                f"(waited for by rank {self._rank}); the group cannot go on without it, restart "
                "the ranks",
                operation=topic,
                rank=rank,
            ) from error
        return bytes(self.store.get(key)).decode()[:-1]

    def swap(self, topic: str, text: str, timeout_s: float | None = None) -> list[str]:
        """Post, and `read` what all post, by rank."""
        self.post(topic, text)
        return [self.read(topic, rank, timeout_s) for rank in range(self._num_ranks)]

    def _key(self, topic: str, rank: int) -> str:
        return f"{self.name}/{topic}/{rank}"


_numbers: MutableMapping[dist.ProcessGroup, itertools.count[int]] = WeakKeyDictionary()
