"""Which blocks of a heap belong to which CUDA graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch

from fusco.engines.cuda.launch import checked
from fusco.layout.compact import BLOCK_ALIGNMENT
from fusco.layout.heap import Heap


class CapturedHeaps:
    """A heap for each memory pool of CUDA graphs.

    A replay writes again what its graph was captured with, so a block that a graph has used is only
    for graphs that share its pool: torch promises the same of its tensors' memory, to graphs that
    are replayed in the order of their capture, and not at once.

    Args:
        device: whose graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_capture: dict[int, Heap] = {}
        self._of_pool: defaultdict[Hashable, Heap] = defaultdict(
            lambda: Heap(alignment=BLOCK_ALIGNMENT)
        )

    def of(self, stream: int) -> Heap:
        """What is free for the graph that `stream` is being captured into."""
        capture = capture_on(stream)
        heap = self._of_capture.get(capture)
        if heap is None:
            pool = captured_pool(self._device) or capture
            heap = self._of_capture[capture] = self._of_pool[pool]
        return heap


def capture_on(stream: int) -> int:
    """The number of the capture that a stream takes part in, unique in a process."""
    from cuda.bindings import driver

    _, number, *_ = checked(driver.cuStreamGetCaptureInfo(stream))
    return int(number)


def captured_pool(device: torch.device) -> tuple[int, int] | None:
    """The memory pool of the graph that the current stream is captured into; None where torch's
    allocator keeps none, or does not say."""
    probe = torch.empty(1, dtype=torch.uint8, device=device)
    address = probe.data_ptr()
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # of allocators other than torch's own
        return None
    for segment in segments:
        if 0 <= address - segment["address"] < segment["total_size"]:
            pool = tuple(segment["segment_pool_id"])
            return pool if any(pool) else None
    return None
