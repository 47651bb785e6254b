"""Slices: bundles of rows of bounded size, several on their way to and from every peer.

The staging memory is a ring of fixed size. A slice leaves when its slot is loaded, and a slot is
loaded again when its slice has left; a peer sends only into slots that are free. So a rank that
falls behind holds up those that send to it, and nobody keeps what nobody takes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.profiling import mark
from fusco.transports.notices import notices_of
from fusco.transports.wires import Moving, Wire

_EVERYBODY = -1


@dataclass(frozen=True, kw_only=True)
class Lane:
    """The slices to or from one peer: the bytes of each step's; 0 where a step has none."""

    peer: int
    sizes: list[int]


class Cargo(ABC):
    """What one operation moves, step by step; a step has at most one slice a lane.

    All ranks go through the same steps in the same order, each to the last it has a part in. A
    step is loaded `depth` steps before it is unloaded, at most.

    Attributes:
        outgoing: lanes to peers.
        incoming: lanes from peers.
    """

    outgoing: list[Lane]
    incoming: list[Lane]

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Steps that this rank has a part in."""

    @abstractmethod
    def stride(self, step: int) -> int:
        """Bytes from the slot of one lane to that of the next."""

    def begin(self, step: int) -> None:  # noqa: B027 - not every cargo has something to do
        """Before the step is loaded."""

    @abstractmethod
    def load(self, step: int, lane: int, slot: Tensor) -> None:
        """Fill a slice, uint8 `[size]`, for an outgoing lane."""

    def meanwhile(self) -> None:  # noqa: B027 - as `begin`
        """Work that needs no network, once the first slices are on their way."""

    def unload(self, step: int, lane: int, slot: Tensor) -> None:  # noqa: B027 - as `begin`
        """Take a slice, uint8 `[size]`, that an incoming lane has brought."""

    def end(self, step: int, slots: Tensor) -> None:  # noqa: B027 - as `begin`
        """All lanes have brought the step's slices: uint8, lane by lane at the step's stride."""


class SliceTransport:
    """Moves cargoes between the ranks of a group.

    Args:
        group: the ranks.
        wire: between them; None where there is but one node.
        slot_bytes: the largest slice.
        num_lanes: the most peers at once, in each direction.
        depth: slices on their way to and from each of them.
        device: of the staging memory.
        timeout_s: bound of every wait, seconds.
        wait_s: `[P]`, where to add up the seconds spent waiting for each rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        wire: Wire | None,
        *,
        slot_bytes: int,
        num_lanes: int,
        depth: int,
        device: torch.device,
        timeout_s: float,
        wait_s: list[float],
    ) -> None:
        self._wire = wire
        self._depth = depth
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._notices = notices_of(group)
        shape = (depth, num_lanes * slot_bytes)
        self._leaving = torch.empty(shape, dtype=torch.uint8, device=device)
        self._arriving = torch.empty(shape, dtype=torch.uint8, device=device)

    @property
    def staging_bytes(self) -> int:
        """The memory of the ring, the same for messages of any size."""
        return self._leaving.numel() + self._arriving.numel()

    def close(self, *, is_lost: bool = False) -> None:
        """Give the ring up; where a rank was lost also what is under way."""
        if is_lost and self._wire is not None:
            self._wire.abort()
        self._leaving = self._arriving = self._leaving.new_empty(0)

    def run(self, cargo: Cargo, operation: str) -> None:
        """Move a cargo whole.

        Raises:
            PeerError: a peer died, or did not send or take a slice in time.
        """
        depth, steps = self._depth, cargo.num_steps
        leaving: list[list[Moving]] = [[] for _ in range(depth)]
        arriving: list[list[Moving]] = [[] for _ in range(depth)]
        for step in range(min(depth, steps)):
            arriving[step] = self._expect(cargo, step, operation)
        for step in range(min(depth, steps)):
            leaving[step] = self._send(cargo, step, operation)
        cargo.meanwhile()
        for step in range(steps):
            at, ahead = step % depth, step + depth
            self._collect(cargo, step, arriving[at], operation)
            if ahead < steps:
                arriving[at] = self._expect(cargo, ahead, operation)
                self._finish("send", leaving[at], operation)
                leaving[at] = self._send(cargo, ahead, operation)
        for sent in leaving:
            self._finish("send", sent, operation)

    def _expect(self, cargo: Cargo, step: int, operation: str) -> list[Moving]:
        moving = []
        for number, lane in enumerate(cargo.incoming):
            slot = _slot(self._arriving[step % self._depth], cargo, lane, number, step)
            if slot.numel():
                moving.append(self._begin("receive", slot, lane.peer, step, operation))
        return moving

    def _send(self, cargo: Cargo, step: int, operation: str) -> list[Moving]:
        moving = []
        begin_s = time.perf_counter()
        cargo.begin(step)
        for number, lane in enumerate(cargo.outgoing):
            slot = _slot(self._leaving[step % self._depth], cargo, lane, number, step)
            if slot.numel():
                cargo.load(step, number, slot)
                mark(operation, "load", lane.peer, step, begin_s, time.perf_counter())
                moving.append(self._begin("send", slot, lane.peer, step, operation))
            begin_s = time.perf_counter()
        self._flush(cargo, step, operation)
        return moving

    def _collect(self, cargo: Cargo, step: int, arriving: list[Moving], operation: str) -> None:
        slots, expected = self._arriving[step % self._depth], iter(arriving)
        for number, lane in enumerate(cargo.incoming):
            slot = _slot(slots, cargo, lane, number, step)
            if slot.numel():
                self._wait("receive", next(expected), operation)
                begin_s = time.perf_counter()
                cargo.unload(step, number, slot)
                mark(operation, "unload", lane.peer, step, begin_s, time.perf_counter())
        begin_s = time.perf_counter()
        cargo.end(step, slots)
        mark(operation, "unload", _EVERYBODY, step, begin_s, time.perf_counter())

    def _begin(self, stage: str, slot: Tensor, peer: int, step: int, operation: str) -> Moving:
        assert self._wire is not None, "a peer is on another node"
        try:
            if stage == "send":
                return self._wire.send(slot, peer, step)
            return self._wire.receive(slot, peer, step)
        except RuntimeError as error:
            raise self._notices.error(operation, peer, self._timeout_s, is_late=False) from error

    def _flush(self, cargo: Cargo, step: int, operation: str) -> None:
        if self._wire is None:
            return
        try:
            self._wire.flush(step)
        except RuntimeError as error:
            peer = next(lane.peer for lane in (*cargo.incoming, *cargo.outgoing))
            raise self._notices.error(operation, peer, self._timeout_s, is_late=False) from error

    def _finish(self, stage: str, moving: list[Moving], operation: str) -> None:
        for one in moving:
            self._wait(stage, one, operation)

    def _wait(self, stage: str, moving: Moving, operation: str) -> None:
        start_s = time.perf_counter()
        assert self._wire is not None, "a peer is on another node"
        try:
            self._wire.wait(moving, self._timeout_s)
        except RuntimeError as error:
            is_late = time.perf_counter() - start_s >= self._timeout_s
            raise self._notices.error(
                operation, moving.peer, self._timeout_s, is_late=is_late
            ) from error
        end_s = time.perf_counter()
        self._wait_s[moving.peer] += end_s - start_s
        mark(operation, stage, moving.peer, moving.step, moving.begin_s, end_s)


def _slot(slots: Tensor, cargo: Cargo, lane: Lane, number: int, step: int) -> Tensor:
    begin = number * cargo.stride(step)
    size = lane.sizes[step] if step < len(lane.sizes) else 0
    return slots[begin : begin + size]
