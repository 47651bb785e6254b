"""What carries slices: messages one by one (gloo), or all of a step at once (NCCL)."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.groups import cuda_backend
from fusco.transports.line import line_of, tag_of
from fusco.transports.notices import Notices, notices_of

_TAG = 0xF05E
_LOOK_S = 1e-3
_NAP_S = 20e-6


@dataclass(kw_only=True)
class Moving:
    """A slice on its way: its peer and step, when it was begun, and what is under way for it."""

    peer: int
    step: int
    works: list[dist.Work] = field(default_factory=list)
    begin_s: float = field(default_factory=time.perf_counter)


class Wire(ABC):
    """Between the ranks of a group. What cannot be begun or does not arrive is a RuntimeError.

    Slices of a rank for a peer arrive in the order of their steps.
    """

    @abstractmethod
    def receive(self, slot: Tensor, peer: int, step: int) -> Moving:
        """Expect a slice."""

    @abstractmethod
    def send(self, slot: Tensor, peer: int, step: int) -> Moving:
        """Let a slice go."""

    def flush(self, step: int) -> None:  # noqa: B027 - what has begun need not be told
        """All slices of a step have been told."""

    @abstractmethod
    def wait(self, moving: Moving, timeout_s: float) -> None:
        """Until a slice has left, or come."""

    def abort(self) -> None:  # noqa: B027 - messages that nobody waits for hold up nobody
        """End what is under way, after a rank was lost. Idempotent."""


class MessageWire(Wire):
    """Messages of CPU tensors, each on its own."""

    def __init__(self, group: dist.ProcessGroup, channel: int) -> None:
        self._line = line_of(group)
        self._tag = tag_of(_TAG, channel)

    def receive(self, slot: Tensor, peer: int, step: int) -> Moving:
        work = self._line.recv([slot], peer, self._tag)
        return Moving(peer=peer, step=step, works=[work])

    def send(self, slot: Tensor, peer: int, step: int) -> Moving:
        work = self._line.send([slot], peer, self._tag)
        return Moving(peer=peer, step=step, works=[work])

    def wait(self, moving: Moving, timeout_s: float) -> None:
        for work in moving.works:
            work.wait(timeout=timedelta(seconds=timeout_s))


class StepWire(Wire):
    """All slices of a step in one coalesced operation, as NCCL wants it.

    NCCL runs what it is given on one stream, one after the other. Since an operation holds both
    what a rank sends and what it receives in a step, and all ranks go through the steps in one
    order, the operation of the least step that is not done can always end.

    Args:
        group: the ranks; all make their wires together.
        device: of the slices.
        peers: ranks that slices may go to or come from; each has this one among its own.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, peers: Sequence[int]
    ) -> None:
        self._group = group
        self._device = device
        self._notices = notices_of(group)
        self._is_aborted = False
        self._told: dict[int, list[tuple[dist.P2POp, Moving]]] = defaultdict(list)
        # A communicator is made by all ranks together; in a step some may have nothing to do.
        dist.all_reduce(torch.zeros(1, dtype=torch.uint8, device=device), group=group)
        self._connect(peers)

    def _connect(self, peers: Sequence[int]) -> None:
        """NCCL connects two ranks in the first operation of theirs, and its host waits for that
        without a bound: better here, where all ranks come, than where one may have been lost."""
        if not peers:
            return
        mine = torch.zeros(1, dtype=torch.uint8, device=self._device)
        theirs = torch.zeros(len(peers), dtype=torch.uint8, device=self._device).split(1)
        operations = [
            dist.P2POp(dist.irecv, each, group=self._group, group_peer=peer)
            for each, peer in zip(theirs, peers, strict=True)
        ]
        for peer in peers:
            operations.append(dist.P2POp(dist.isend, mine, group=self._group, group_peer=peer))
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def receive(self, slot: Tensor, peer: int, step: int) -> Moving:
        return self._tell(dist.P2POp(dist.irecv, slot, group=self._group, group_peer=peer), step)

    def send(self, slot: Tensor, peer: int, step: int) -> Moving:
        return self._tell(dist.P2POp(dist.isend, slot, group=self._group, group_peer=peer), step)

    def flush(self, step: int) -> None:
        told = self._told.pop(step, [])
        if not told:
            return
        works = dist.batch_isend_irecv([operation for operation, _ in told])
        for _, moving in told:
            moving.works = works
            moving.begin_s = time.perf_counter()

    def wait(self, moving: Moving, timeout_s: float) -> None:
        try:
            for work in moving.works:
                _wait_for(work, time.perf_counter() + timeout_s, self._notices)
        except RuntimeError:
            self.abort()
            raise
        # All of the step share them, and wait once.
        moving.works.clear()

    def _tell(self, operation: dist.P2POp, step: int) -> Moving:
        moving = Moving(peer=operation.group_peer, step=step)
        self._told[step].append((operation, moving))
        return moving

    def abort(self) -> None:
        # A kernel that waits would keep the process from ending, and torch ends the process when it
        # finds an error of NCCL by itself.
        if not self._is_aborted:
            self._is_aborted = True
            with contextlib.suppress(RuntimeError):
                self._group._get_backend(self._device).abort()


def _wait_for(work: dist.Work, deadline_s: float, notices: Notices) -> None:
    look_s = 0.0
    while not work.is_completed():
        now_s = time.perf_counter()
        if now_s >= deadline_s:
            raise RuntimeError("timed out")
        if now_s >= look_s:
            # NOTE: without a timeout this lets the stream wait and not the host; it raises what
            # NCCL has found wrong meanwhile.
            work.wait()
            if notices.has_lost:
                raise RuntimeError("a rank was lost")
            look_s = now_s + _LOOK_S
        time.sleep(_NAP_S)
    work.wait()


_MESSAGE_BYTES = 512 << 10
"""10 ms on a link of 400 Mbit/s."""
_STEP_BYTES = 16 << 20
"""8 ms on sockets of 2 GB/s. A GPU gathers and scatters a slice in microseconds, so that little is
lost before the first and after the last, but between two operations the link rests for a moment."""


def slice_bytes(device: torch.device, num_nodes: int) -> int:
    """How large a slice should be, where a row is not larger; the same on all ranks."""
    if device.type == "cpu":
        return _MESSAGE_BYTES
    return max(_STEP_BYTES // max(num_nodes - 1, 1), _MESSAGE_BYTES)


def open_wire(
    group: dist.ProcessGroup, device: torch.device, peers: Sequence[int], channel: int = 0
) -> Wire:
    """The wire for tensors on a device, to and from these ranks; collective. For `channel` see
    `tag_of`.

    Raises:
        RuntimeError: the group sends no such tensors between hosts.
    """
    if device.type == "cpu":
        return MessageWire(group, channel)
    backend = cuda_backend(group)
    if backend != "nccl":
        raise RuntimeError(f"the group sends CUDA tensors by {backend or 'nothing'}, not by nccl")
    return StepWire(group, device, peers)
