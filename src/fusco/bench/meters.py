"""Copies that measure bandwidth: what the floor is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist

# NOTE: large against the caches that four ranks share on a server (32 MiB on an EPYC 7003), and
# against the 60 MB of an H200.
COPY_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
LINK_BYTES = 256 * 2**20


class Meter(ABC):
    """One rank's share of a copy that measures bandwidth."""

    @abstractmethod
    def copy(self) -> None:
        """Copy once. The pages of both buffers are there already."""


class CopyMeter(Meter):
    """`COPY_BYTES` from buffer to buffer of this rank's memory."""

    def __init__(self, device: torch.device) -> None:
        size = COPY_BYTES[device.type] // 4
        self._source = torch.ones(size, device=device)
        self._target = torch.zeros(size, device=device)

    def copy(self) -> None:
        self._target.copy_(self._source)


class LinkMeter(Meter):
    """`LINK_BYTES` into the memory of the next rank, while the one before writes into this one's.

    Making one is collective.
    """

    def __init__(self, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        world = dist.group.WORLD
        assert world is not None
        self._source = torch.ones(LINK_BYTES // 4, device=device)
        self._memory = symmetric_memory.empty(LINK_BYTES // 4, dtype=torch.float32, device=device)
        self._handle = symmetric_memory.rendezvous(self._memory, world)
        peer = (world.rank() + 1) % world.size()
        self._target = self._handle.get_buffer(peer, self._memory.shape, torch.float32)

    def copy(self) -> None:
        self._target.copy_(self._source)


def copy_gbps(device: str, num_ranks: int, seconds: float) -> float:
    """10^9 bytes a second, read plus written, that `num_ranks` ranks copying at once reach."""
    return 2 * COPY_BYTES[device] * num_ranks / seconds / 1e9


def link_gbps(seconds: float) -> float:
    """10^9 bytes a second that each rank sends while it receives as many."""
    return LINK_BYTES / seconds / 1e9
