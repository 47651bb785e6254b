"""In which order operations run on streams, with the streams left out."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusco.engines.cuda import streams
from fusco.engines.cuda.streams import Order
from fusco.layout.heap import Block, Heap


class Stream:
    """A stream that notes whom it waits for."""

    def __init__(self, handle: int, waits: list[tuple[int, int]]) -> None:
        self.handle = handle
        self._waits = waits

    def wait_stream(self, other: Stream) -> None:
        self._waits.append((self.handle, other.handle))

    def wait_event(self, event: Event) -> None:
        self._waits.append((self.handle, event.handle))
        self.awaited = event.number


class Event:
    """Where a stream was; they are numbered."""

    number = 0

    def record(self, stream: Stream) -> None:
        if Event.number < 0:
            raise RuntimeError("the device is broken")
        Event.number += 1
        self.handle, self.number = stream.handle, Event.number


class Device:
    """Operations begin on streams, captured into a graph or not; who waits for whom is kept."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._waits: list[tuple[int, int]] = []
        self.streams = [Stream(handle, self._waits) for handle in range(4)]
        self._current, self._graph = self.streams[0], 0
        patch.setattr(streams, "_TRAFFIC", defaultdict(streams._Traffic))
        patch.setattr(streams, "_CAPTURED", {})
        patch.setattr(torch.cuda, "current_stream", lambda _: self._current)
        patch.setattr(torch.cuda, "device", nullcontext)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self._graph > 0)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(streams, "capture_on", lambda _: self._graph)
        raw = SimpleNamespace(_cuda_getCurrentRawStream=lambda _: self._current.handle)
        patch.setattr(torch, "_C", raw)
        self.order = self.other_order()
        self.heap = Heap(1024, uses=self.order)

    def other_order(self, *, has_room: bool = False) -> Order:
        """Of another Shuffle."""
        order = Order(torch.device("cuda", 0))
        order.has_room = has_room
        return order

    def begin(
        self, handle: int, graph: int = 0, order: Order | None = None
    ) -> list[tuple[int, int]]:
        """The waits of an operation that begins; `graph` numbers what it is captured into."""
        self._waits.clear()
        self.go_to(handle, graph)
        assert (order or self.order).begin() == handle
        return sorted(self._waits)

    def go_to(self, handle: int, graph: int = 0) -> None:
        """Change the stream."""
        self._current, self._graph = self.streams[handle], graph

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
    device.heap.release(everything)
    assert device.begin(1) == [(1, 0)]
    assert device.reserve() == []
    # The last of what another stream did with any of it is enough.
    device.go_to(2)
    device.heap.release(Block(0, 512))
    device.heap.release(Block(512, 512))
    device.begin(0)
    assert device.reserve() == [(0, 2)]
    assert device.streams[0].awaited == Event.number
    device.heap.release(everything)
    assert device.reserve() == []


def test_memory_let_go_while_the_stream_changes_is_waited_for(device: Device) -> None:
    device.begin(0)
    device.reserve()

    def wait_stream(other: Stream) -> None:
        # Another thread's, just after this stream has begun to wait.
        device.go_to(0)
        device.heap.release(Block(0, 1024))
        device.go_to(1)

    device.streams[1].wait_stream = wait_stream  # type: ignore[method-assign]
    device.begin(1)
    assert device.reserve() == [(1, 0)]


@pytest.mark.parametrize("problem", ["broken", "ending"])
def test_memory_is_let_go_whatever_happens(
    device: Device, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.begin(0)
    device.reserve()
    device.go_to(2)
    if problem == "broken":
        monkeypatch.setattr(Event, "number", -1)
    else:
        monkeypatch.setattr(device.order, "_is_process_ending", lambda: True)
        monkeypatch.setattr(streams, "torch", None)
    device.heap.release(Block(0, 1024))
    monkeypatch.undo()
    device.go_to(0)
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


@pytest.mark.parametrize("graph", [0, 1])
def test_shuffles_without_room_beside_each_other_take_turns(device: Device, graph: int) -> None:
    other = device.other_order()
    assert device.begin(0, graph) == []
    assert device.begin(1, graph, other) == [(1, 0)]
    assert device.begin(1, graph, other) == []
    assert device.begin(1, graph) == [(1, 0)]
    assert device.begin(2, graph, other) == [(2, 1)]


def test_shuffles_with_room_run_beside_each_other_but_not_beside_others(device: Device) -> None:
    one, two = (device.other_order(has_room=True) for _ in range(2))
    assert device.begin(0) == []
    assert device.begin(1, order=one) == [(1, 0)]
    assert device.begin(2, order=two) == [(2, 0)]
    assert device.begin(1, order=one) == [(1, 0)]
    assert device.begin(3, order=one) == [(3, 0), (3, 1)]  # in its own order
    assert device.begin(0) == [(0, 1), (0, 2), (0, 3)]
    assert device.begin(0) == []
    one.close()
    assert device.begin(2, order=two) == [(2, 0)]
    two.close()
    assert device.begin(0) == []


def test_nobody_waits_for_a_shuffle_that_is_closed(device: Device) -> None:
    other = device.other_order()
    device.begin(1, order=other)
    other.close()
    assert device.begin(0) == []


def test_who_comes_back_to_its_stream_waits_for_those_beside_it(device: Device) -> None:
    one, two = (device.other_order(has_room=True) for _ in range(2))
    device.begin(0)
    device.begin(1, order=one)
    device.begin(0, order=two)
    assert device.begin(0) == [(0, 1)]
    other = device.other_order()
    device.begin(1, order=other)
    device.begin(0, order=one)
    assert device.begin(0) == [(0, 1)]
    assert device.begin(2, order=two) == [(2, 0)]


def test_captures_at_once_do_not_mix(device: Device) -> None:
    other = device.other_order()
    device.begin(0, graph=1)
    device.begin(2, graph=2, order=other)
    assert device.begin(1, graph=1) == [(1, 0)]
    assert device.begin(3, graph=2, order=other) == [(3, 2)]
    for graph in range(3, 40):
        device.begin(0, graph)
    assert len(streams._CAPTURED) == streams._MOST_CAPTURES
