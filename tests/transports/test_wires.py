"""Slices of a step that travel in one operation: what is asked for when, and how waits end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusco.transports import wires

SLOT = torch.zeros(8, dtype=torch.uint8)
CUDA = torch.device("cuda", 0)


class Work:
    """Of NCCL: it says whether it is done, and raises what went wrong when it is waited for."""

    def __init__(self, looks: int, problem: str = "") -> None:
        self.looks = looks
        self.problem = problem
        self.num_waits = 0

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> bool:
        self.num_waits += 1
        if self.problem:
            raise RuntimeError(self.problem)
        return True


class Batches:
    """What was asked of torch, and the works that it gives."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, int]]] = []
        self.works: list[Work] = []
        self.num_aborts = 0
        self.has_lost = False

    def begin(self, operations: list[Any]) -> list[Work]:
        self.asked.append([(each.op, each.group_peer) for each in operations])
        return [self.works.pop(0)]

    def abort(self) -> None:
        self.num_aborts += 1

    def wire(self, *peers: int) -> wires.StepWire:
        group: Any = SimpleNamespace(_get_backend=lambda device: self)
        with mock.patch.object(wires, "notices_of", return_value=self):
            return wires.StepWire(group, torch.device("cpu"), peers)


def operation(op: Any, slot: torch.Tensor, group: Any, group_peer: int) -> Any:
    return SimpleNamespace(op=op.__name__, slot=slot, group_peer=group_peer)


@pytest.fixture
def batches() -> Iterator[Batches]:
    made = Batches()
    with (
        mock.patch.object(dist, "all_reduce"),
        mock.patch.object(dist, "P2POp", operation),
        mock.patch.object(dist, "batch_isend_irecv", made.begin),
    ):
        yield made


def test_all_peers_are_connected_at_once(batches: Batches) -> None:
    batches.works = [work := Work(0)]
    batches.wire(2, 5)
    assert batches.asked == [[("irecv", 2), ("irecv", 5), ("isend", 2), ("isend", 5)]]
    assert work.num_waits == 1


def test_a_step_is_one_operation(batches: Batches) -> None:
    wire = batches.wire()
    batches.works = [Work(2), Work(0)]
    first = [wire.receive(SLOT, 1, 0), wire.receive(SLOT, 2, 0)]
    later = wire.receive(SLOT, 1, 1)
    first.append(wire.send(SLOT, 2, 0))
    assert batches.asked == []
    wire.flush(0)
    assert batches.asked == [[("irecv", 1), ("irecv", 2), ("isend", 2)]]
    for moving in first:
        wire.wait(moving, 60.0)
    wire.flush(2)  # nothing
    wire.flush(1)
    wire.wait(later, 60.0)
    assert batches.asked[1:] == [[("irecv", 1)]]


def test_a_wait_is_bounded_and_ends_what_is_under_way(batches: Batches) -> None:
    wire = batches.wire()
    batches.works = [Work(1 << 60)]
    moving = wire.send(SLOT, 1, 0)
    wire.flush(0)
    begin_s = time.perf_counter()
    with pytest.raises(RuntimeError, match="timed out"):
        wire.wait(moving, 0.2)
    assert 0.2 <= time.perf_counter() - begin_s < 60
    assert batches.num_aborts == 1


def test_what_went_wrong_is_found_while_waiting(batches: Batches) -> None:
    wire = batches.wire()
    batches.works = [Work(1 << 60, problem="remote process exited")]
    moving = wire.receive(SLOT, 1, 0)
    wire.flush(0)
    with pytest.raises(RuntimeError, match="remote process exited"):
        wire.wait(moving, 60.0)
    assert batches.num_aborts == 1


def test_a_wait_ends_when_a_rank_was_lost(batches: Batches) -> None:
    wire = batches.wire()
    batches.works = [Work(1 << 60)]
    moving = wire.receive(SLOT, 1, 0)
    wire.flush(0)
    batches.has_lost = True
    with pytest.raises(RuntimeError, match="a rank was lost"):
        wire.wait(moving, 60.0)
    assert batches.num_aborts == 1


def test_gpus_want_larger_slices_but_not_with_many_peers() -> None:
    cpu = {wires.slice_bytes(torch.device("cpu"), nodes) for nodes in (1, 2, 64)}
    assert cpu == {512 << 10}
    sizes = [wires.slice_bytes(CUDA, nodes) for nodes in (1, 2, 5, 1000)]
    assert sizes == [16 << 20, 16 << 20, 4 << 20, 512 << 10]


@pytest.mark.parametrize("backend", ["gloo", ""])
def test_only_nccl_joins_nodes_of_gpus(backend: str) -> None:
    with (
        mock.patch.object(wires, "cuda_backend", return_value=backend),
        pytest.raises(RuntimeError, match=f"by {backend or 'nothing'}, not by nccl"),
    ):
        wires.open_wire(mock.Mock(), CUDA, [1])
