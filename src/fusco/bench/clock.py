"""How long a call takes a rank, from when all ranks may begin."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Span = tuple[float, float]
"""When one rank began something and when it was done, in seconds of its host's clock; a time that
events measured begins at 0."""

# NOTE: about 0.3 ms on an H100 or H200, more than the host needs to launch a dispatch.
HOST_LEAD_CYCLES = 600_000


class Clock(ABC):
    """Ranks leave a barrier together, then the time runs. Both clocks are collective.

    Attributes:
        host_overlaps: a call may return before its work is done, so that two calls in a row take
            less than each alone.
    """

    host_overlaps: bool

    @abstractmethod
    def time(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Span]:
        """What the call returned, and its time on this rank."""


class HostClock(Clock):
    """For CPU tensors."""

    host_overlaps = False

    def time(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Span]:
        dist.barrier()
        begin = time.perf_counter()
        result = call(*arguments)
        return result, (begin, time.perf_counter())


class EventClock(Clock):
    """For CUDA tensors: the time between two events on the current stream.

    The barrier is on the devices, so that their queues begin together. As in a model, where it
    still works on what came before, the device is kept busy while the host launches ahead.

    Args:
        device: of this rank.
        has_nccl: False where ranks share a GPU, which NCCL refuses: then the hosts meet, and times
            are only good to see that nothing is far off.
    """

    host_overlaps = True

    def __init__(self, device: torch.device, *, has_nccl: bool) -> None:
        self._token = torch.zeros(1, device=device if has_nccl else "cpu")
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def time(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Span]:
        if self._token.is_cuda:
            torch.cuda._sleep(HOST_LEAD_CYCLES)
        else:
            torch.cuda.synchronize()
        dist.all_reduce(self._token)
        self._begin.record()
        result = call(*arguments)
        self._end.record()
        self._end.synchronize()
        return result, (0.0, self._begin.elapsed_time(self._end) / 1e3)
