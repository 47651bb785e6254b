"""On which streams the operations of a Shuffle run, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from fusco.engines.cuda.graphs import capture_on
from fusco.layout.heap import ALIGNMENT, Block, Heap
from fusco.types import Dispatched, as_tuple

Result = TypeVar("Result")


class Order:
    """Keeps operations in the order of their calls, whatever stream they are made on.

    Kernels of one stream need nothing for that, so it is only on a change of streams that the new
    one waits for the old: for the last operation, and for what has used its results since, whose
    memory may be written again. The operations of a CUDA graph are ordered likewise, among
    themselves: when they run, its replays say.

    Attributes:
        is_capturing: whether the operation that began last is captured into a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = device.index
        self.is_capturing = False
        self._last: int | None = None
        self._last_stream: torch.cuda.Stream | None = None
        self._captured: tuple[int, torch.cuda.Stream] | None = None  # last, and into which graph
        self._side: torch.cuda.Stream | None = None
        self._uses: dict[int, torch.cuda.Event] = {}  # by the handle of their stream

    def begin(self) -> int:
        """The handle of the stream for the operation that begins now."""
        # NOTE: the public current_stream() takes ten times as long.
        handle: int = torch._C._cuda_getCurrentRawStream(self._index)
        self.is_capturing = torch.cuda.is_current_stream_capturing()
        if self.is_capturing:
            self._begin_captured(capture_on(handle))
        elif handle != self._last:
            stream = torch.cuda.current_stream(self._device)
            if self._last_stream is not None:
                stream.wait_stream(self._last_stream)
            self._last, self._last_stream = handle, stream
        return handle

    def _begin_captured(self, capture: int) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._captured is not None:
            last_capture, last_stream = self._captured
            if last_capture == capture and last_stream != stream:
                stream.wait_stream(last_stream)
        self._captured = capture, stream

    def note_use(self) -> None:
        """Memory is let go that the current stream may still use; finalizers call this.

        If that is the stream of the last operation, the next one follows it in any case.
        """
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        if handle == self._last:
            return
        with suppress(RuntimeError):  # of a broken device
            if not torch.cuda.is_current_stream_capturing():
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
                self._uses[handle] = event

    def await_uses(self) -> None:
        """Let the operation that has begun, unless it is captured, follow what `note_use` noted."""
        while self._uses and not self.is_capturing:
            _, event = self._uses.popitem()
            torch.cuda.current_stream(self._device).wait_event(event)

    def run_beside(
        self, operation: Callable[[], Result], inputs: Iterable[Tensor]
    ) -> tuple[Result, torch.cuda.Event]:
        """Run an operation on a side stream, after all that was asked of the current one.

        Returns:
            its result, and the event after which another stream may use it.
        """
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        for tensor in inputs:
            if tensor.is_cuda:
                tensor.record_stream(self._side)
        with torch.cuda.stream(self._side):
            result = operation()
            event = self._side.record_event()
        # The memory of the results is the side stream's, but they will be used on this one.
        for tensor in _tensors_of(result):
            tensor.record_stream(current)
        return result, event

    def synchronize(self) -> None:
        """Until the last operation is done."""
        if self._last_stream is not None:
            self._last_stream.synchronize()


class OrderedHeap(Heap):
    """A heap of memory that streams use: an operation that takes a block follows what its last
    tensor's stream was to do when that was dropped.

    Args:
        order: of the operations that take blocks.
        alignment: of blocks, bytes.
    """

    def __init__(self, order: Order, alignment: int = ALIGNMENT) -> None:
        super().__init__(alignment=alignment)
        self._order = order

    def release(self, block: Block) -> None:
        """See `Heap.release`."""
        self._order.note_use()  # before another thread can take the block
        super().release(block)

    def reserve_largest(self) -> Block:
        """See `Heap.reserve_largest`."""
        block = super().reserve_largest()
        self._order.await_uses()
        return block


def _tensors_of(result: object) -> Iterable[Tensor]:
    if isinstance(result, Dispatched):
        tensors = [*as_tuple(result.tokens), result.row_weights, *result.plan.to_tensors()]
    else:
        assert isinstance(result, (Tensor, tuple)), "what dispatch and combine return"
        tensors = [*as_tuple(result)]
    return [each for each in tensors if each.is_cuda]
