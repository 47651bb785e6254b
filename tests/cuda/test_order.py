"""In which order operations run on streams, with the streams left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusco.engines.cuda import streams
from fusco.engines.cuda.streams import Order


class Stream:
    """A stream that notes whom it waits for."""

    def __init__(self, handle: int, waits: list[tuple[int, int]]) -> None:
        self.handle = handle
        self._waits = waits

    def wait_stream(self, other: Stream) -> None:
        self._waits.append((self.handle, other.handle))


class Device:
    """Operations begin on streams, captured into a graph or not; who waits for whom is kept."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._waits: list[tuple[int, int]] = []
        self._streams = [Stream(handle, self._waits) for handle in range(4)]
        self._current, self._graph = self._streams[0], 0
        self._order = Order(torch.device("cuda", 0))
        patch.setattr(torch.cuda, "current_stream", lambda _: self._current)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self._graph > 0)
        patch.setattr(streams, "capture_on", lambda _: self._graph)
        raw = SimpleNamespace(_cuda_getCurrentRawStream=lambda _: self._current.handle)
        patch.setattr(torch, "_C", raw)

    def begin(self, handle: int, graph: int = 0) -> list[tuple[int, int]]:
        """The waits of an operation that begins; `graph` numbers what it is captured into."""
        self._waits.clear()
        self._current, self._graph = self._streams[handle], graph
        assert self._order.begin() == handle
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
