"""In which order operations run on streams, with the streams left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusco.engines.cuda import streams
from fusco.engines.cuda.streams import Order, OrderedHeap
from fusco.layout.heap import Block


class Stream:
    """A stream that notes whom it waits for."""

    def __init__(self, handle: int, waits: list[tuple[int, int]]) -> None:
        self.handle = handle
        self._waits = waits

    def wait_stream(self, other: Stream) -> None:
        self._waits.append((self.handle, other.handle))

    def wait_event(self, event: Event) -> None:
        self._waits.append((self.handle, event.handle))


class Event:
    """Where a stream was."""

    handle = -1

    def record(self, stream: Stream) -> None:
        self.handle = stream.handle


class Device:
    """Operations begin on streams, captured into a graph or not; who waits for whom is kept."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._waits: list[tuple[int, int]] = []
        self._streams = [Stream(handle, self._waits) for handle in range(4)]
        self._current, self._graph = self._streams[0], 0
        self._order = Order(torch.device("cuda", 0))
        self.heap = OrderedHeap(self._order)
        self.heap.add(0, 1024)
        patch.setattr(torch.cuda, "current_stream", lambda _: self._current)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self._graph > 0)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(streams, "capture_on", lambda _: self._graph)
        raw = SimpleNamespace(_cuda_getCurrentRawStream=lambda _: self._current.handle)
        patch.setattr(torch, "_C", raw)

    def begin(self, handle: int, graph: int = 0) -> list[tuple[int, int]]:
        """The waits of an operation that begins; `graph` numbers what it is captured into."""
        self._waits.clear()
        self.go_to(handle, graph)
        assert self._order.begin() == handle
        return list(self._waits)

    def go_to(self, handle: int, graph: int = 0) -> None:
        """Change the stream."""
        self._current, self._graph = self._streams[handle], graph

    def reserve(self) -> list[tuple[int, int]]:
        """The waits of an operation that has begun, and reserves what is free."""
        self._waits.clear()
        assert self.heap.reserve_largest().size == 1024
        return list(self._waits)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        yield Device(patch)


def test_a_change_of_streams_waits(device: Device) -> None:
    assert device.begin(0) == []
    assert device.begin(0) == []
    assert device.begin(1) == [(1, 0)]
    assert device.begin(0) == [(0, 1)]


def test_operations_of_a_graph_are_ordered_among_themselves(device: Device) -> None:
    device.begin(1)
    # What is not captured cannot be waited for, nor is it on the same stream.
    assert device.begin(1, graph=1) == []
    assert device.begin(2, graph=1) == [(2, 1)]
    assert device.begin(1, graph=1) == [(1, 2)]
    assert device.begin(2, graph=2) == []
    # Nothing of the graphs has run, so what comes after them follows what came before.
    assert device.begin(3) == [(3, 1)]


def test_memory_is_written_after_the_streams_that_let_it_go(device: Device) -> None:
    everything = Block(0, 1024)
    device.begin(0)
    assert device.reserve() == []
    # What follows on the same stream needs no wait, nor does a stream that waits for it.
    device.heap.release(everything)
    assert device.reserve() == []
    # The last of what another stream did with any of it is enough.
    device.go_to(2)
    device.heap.release(Block(0, 512))
    device.heap.release(Block(512, 512))
    device.begin(0)
    assert device.reserve() == [(0, 2)]
    device.heap.release(everything)
    assert device.reserve() == []


def test_what_is_captured_waits_for_nothing_outside(device: Device) -> None:
    everything = Block(0, 1024)
    device.begin(0)
    device.reserve()
    device.go_to(2)
    device.heap.release(everything)
    device.begin(1, graph=1)
    assert device.reserve() == []
    device.heap.release(everything)
    device.begin(1)
    assert device.reserve() == [(1, 2)]
