"""On which streams the operations of a Shuffle run, one after the other."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fusco.engines.cuda.graphs import capture_on
from fusco.layout.heap import Uses
from fusco.types import Dispatched, as_tuple

Result = TypeVar("Result")


class _Traffic:
    """On which streams the operations of all Shuffles are, on one device or in one of its captures.

    One thread at a time makes operations.

    Attributes:
        only: handle of the stream that all of them are on; None: there are several.
    """

    def __init__(self) -> None:
        self.only: int | None = None
        # Since the last operation that needs the device for itself, and with it.
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._alone: torch.cuda.Stream | None = None
        self._last_of: WeakKeyDictionary[Order, torch.cuda.Stream] = WeakKeyDictionary()

    def join(self, order: Order, handle: int, stream: torch.cuda.Stream) -> None:
        """Let an operation on this stream follow those that it must not run beside."""
        before = [*self._streams.values()] if not order.has_room else [self._alone]
        for other in {*before, self._last_of.get(order)}:
            if other is not None and other != stream:
                stream.wait_stream(other)
        if not order.has_room:
            self._streams, self._alone = {}, stream
        self._last_of[order] = self._streams[handle] = stream
        is_only = len(self._streams) == 1 and self._alone in (None, stream)
        self.only = handle if is_only else None

    def leave(self, order: Order) -> None:
        """Forget the operations of one that is done."""
        self._last_of.pop(order, None)
        others = [*self._last_of.values()]
        self._streams = {at: each for at, each in self._streams.items() if each in others}
        self._alone = self._alone if self._alone in others else None
        self.only = None


_TRAFFIC: defaultdict[int, _Traffic] = defaultdict(_Traffic)
"""By the index of a device."""
_CAPTURED: dict[tuple[int, int], _Traffic] = {}
"""Likewise, and by the number of a capture, of the last ones."""
_MOST_CAPTURES = 16


class Order(Uses):
    """Keeps operations in the order of their calls, whatever stream they are made on.

    Kernels of one stream need nothing for that, so it is only on a change of streams that the new
    one waits for the old: for the last operation, and for what has used its results since, whose
    memory may be written again. So it is with another Shuffle's, unless both fit on the device
    together: of kernels that wait for peers, one would keep out the other that a peer waits for.
    The operations of a CUDA graph are ordered likewise, among themselves: when they run, its
    replays say.

    Attributes:
        is_capturing: whether the operation that began last is captured into a CUDA graph.
        has_room: whether there is room on the device for these operations beside those of others.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = device.index
        self.is_capturing = False
        self.has_room = False
        self.traffic = _TRAFFIC[self._index]
        self._last: int | None = None
        self._last_stream: torch.cuda.Stream | None = None
        self._side: torch.cuda.Stream | None = None
        # The last of each thread on each stream, for a finalizer may interrupt another thread's.
        self._uses: dict[tuple[int, int], torch.cuda.Event] = {}
        # NOTE: the public current_stream() takes ten times as long. Kept here, for finalizers may
        # find no modules when the process ends.
        self._current_raw_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream
        self._is_process_ending = sys.is_finalizing

    def begin(self) -> int:
        """The handle of the stream for the operation that begins now."""
        handle = self._current_raw_stream(self._index)
        self.is_capturing = torch.cuda.is_current_stream_capturing()
        if self.is_capturing:
            stream = torch.cuda.current_stream(self._device)
            self._captured(capture_on(handle)).join(self, handle, stream)
        elif not handle == self._last == self.traffic.only:
            stream = torch.cuda.current_stream(self._device)
            # First, for what another thread lets go on the stream before is not waited for later.
            self._last, self._last_stream = handle, stream
            self.traffic.join(self, handle, stream)
        return handle

    def _captured(self, capture: int) -> _Traffic:
        key = self._index, capture
        if key not in _CAPTURED:
            while len(_CAPTURED) >= _MOST_CAPTURES:
                del _CAPTURED[next(iter(_CAPTURED))]
            _CAPTURED[key] = _Traffic()
        return _CAPTURED[key]

    def note_use(self) -> None:
        """See `Uses.note_use`: it is the current stream that may still use the memory.

        If that is the stream of the last operation, the next one follows it in any case.
        """
        handle = self._current_raw_stream(self._index)
        if handle == self._last or self._is_process_ending():
            return
        with suppress(RuntimeError), torch.cuda.device(self._device):  # which may be broken
            if not torch.cuda.is_current_stream_capturing():
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
                self._uses[threading.get_ident(), handle] = event

    def await_uses(self) -> None:
        """See `Uses.await_uses`: the operation that has begun follows, unless it is captured."""
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

    def close(self) -> None:
        """Nothing follows, and nobody needs to wait for what was before."""
        self.traffic.leave(self)


def _tensors_of(result: object) -> Iterable[Tensor]:
    if isinstance(result, Dispatched):
        tensors = [*as_tuple(result.tokens), result.row_weights, *result.plan.to_tensors()]
    else:
        assert isinstance(result, (Tensor, tuple)), "what dispatch and combine return"
        tensors = [*as_tuple(result)]
    return [each for each in tensors if each.is_cuda]
