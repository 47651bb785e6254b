"""How long a call takes a rank, from when all ranks may begin."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fusco.groups import group_timeout_s

Span = tuple[float, float]
"""When one rank began something and when it was done, in seconds of its host's clock; a time that
events measured begins at 0."""

# NOTE: 1.0 ms at the 1.98 GHz of an H100 or H200: a dispatch and a combine are launched in less
# than 0.3 ms, and the rest is for a host that is late.
HEAD_START_CYCLES = 2_000_000


class Clock(ABC):
    """Ranks leave a barrier together, then the time runs. All clocks are collective.

    Attributes:
        head_start_ms: how long before its device the host begins.
    """

    head_start_ms: float = 0.0

    @abstractmethod
    def time(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Span]:
        """What the call returned, and its time on this rank."""


class HostClock(Clock):
    """For CPU tensors."""

    def time(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Span]:
        dist.barrier()
        begin = time.perf_counter()
        result = call(*arguments)
        end = time.perf_counter()
        # Ranks share cores: what the first would do next is no part of the last one's time.
        dist.barrier()
        return result, (begin, end)


class EventClock(Clock):
    """For CUDA tensors: the time between two events on the current stream.

    Without a head start the device is idle when the host begins, so that launching is inside. With
    one the device is busy first, as in a model, where it still works on what came before; what the
    host has launched by then costs nothing, and only what it does after a wait for the device is
    inside.

    Args:
        barrier: of the devices; None where there is none: then hosts meet, and times are only good
            to see that nothing is far off.
        has_head_start: see above.
    """

    def __init__(self, barrier: DeviceBarrier | None, *, has_head_start: bool) -> None:
        self._barrier = barrier
        self._has_head_start = has_head_start
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        if has_head_start:
            self._measure_head_start()  # this one wakes the device
            self.head_start_ms = self._measure_head_start()

    def time(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Span]:
        if self._barrier is None:
            torch.cuda.synchronize()
            dist.all_reduce(torch.zeros(1))
        if self._has_head_start:
            torch.cuda._sleep(HEAD_START_CYCLES)
        # Behind the head start, whose length is in cycles of each device's own clock.
        if self._barrier is not None:
            self._barrier.enqueue()
        if not self._has_head_start:
            torch.cuda.synchronize()
        self._begin.record()
        result = call(*arguments)
        self._end.record()
        self._end.synchronize()
        return result, (0.0, self._begin.elapsed_time(self._end) / 1e3)

    def _measure_head_start(self) -> float:
        self._begin.record()
        torch.cuda._sleep(HEAD_START_CYCLES)
        self._end.record()
        self._end.synchronize()
        elapsed_ms: float = self._begin.elapsed_time(self._end)
        return elapsed_ms


class DeviceBarrier:
    """A barrier of the devices, by flags in each other's memory: one kernel, which ends on all of
    them within microseconds. Making one is collective; it needs a device a rank."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        world = dist.group.WORLD
        assert world is not None
        self._memory = symmetric_memory.empty(1, device=device)
        self._handle = symmetric_memory.rendezvous(self._memory, world)
        self._timeout_ms = int(1e3 * group_timeout_s(world))

    def enqueue(self) -> None:
        """On the current stream; the host goes on."""
        self._handle.barrier(timeout_ms=self._timeout_ms)
