"""The control block: what each rank publishes, and how the others wait for it."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fusco.engines.base import TEXT_BYTES
from fusco.engines.cpu import futex
from fusco.engines.cpu.kernels.memory import (
    collect,
    first_behind,
    publish,
    spin,
    wrapped_difference,
)
from fusco.engines.cpu.window import Mapping
from fusco.errors import PeerError
from fusco.layout.heap import ALIGNMENT, align
from fusco.layout.records import ALIKE, HEADER, Field, Status

_LOOK_EVERY_S = 0.05
_SPINS = 2000


_STAGES = 1 << 16


class Stage(IntEnum):
    """How far a rank has come within an operation. Some have steps, which count from `STEP` on."""

    PUBLISHED = 1
    GROWN = 2
    TOLD = 3
    STEP = 4
    DONE = _STAGES - 2
    READ = _STAGES - 1


_OPEN, _CLOSED, _LOST = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Byte offsets of a control block. The progress flag, its state and growth come first."""

    record_len: int
    progress: int = 0
    state: int = ALIGNMENT
    growth: int = 2 * ALIGNMENT
    record: int = 3 * ALIGNMENT

    @property
    def text(self) -> int:
        return align(self.record + self.record_len * 8)

    @property
    def size(self) -> int:
        return align(self.text + TEXT_BYTES)


class Control:
    """This rank's control block and those of its peers.

    Progress is one int32 counter a rank, `_STAGES * epoch + stage`, which wraps around.

    Args:
        ranks: the numbers in the group of the ranks that share this memory. Within it a rank is
            named by its place among them.
        rank: this one's place.
        record_len: int64 that a rank publishes at once.
        timeout_s: bound of every wait, seconds.
        wait_s: by number in the group, where to add up the seconds waited.
    """

    def __init__(
        self,
        ranks: tuple[int, ...],
        rank: int,
        record_len: int,
        timeout_s: float,
        wait_s: list[float],
    ) -> None:
        self._ranks = ranks
        self._rank = rank
        self._layout = _Layout(record_len=record_len)
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._epoch = 0
        self._peers: list[_Peer] = []
        self.mapping = Mapping.create("fusco-control", self._layout.size)

    def connect(self, mappings: list[Mapping], processes: list[int]) -> None:
        """Tell the control blocks and processes of all ranks, the own one included."""
        self._peers = [
            _Peer(mapping, process, self._layout)
            for mapping, process in zip(mappings, processes, strict=True)
        ]
        here = np.array([mapping.address for mapping in mappings])
        self._flags, self._records = here + self._layout.progress, here + self._layout.record
        cores = len(os.sched_getaffinity(0))
        # A rank that spins keeps a core from the rank it waits for, where there are too few.
        self._spins = _SPINS if len(mappings) <= cores else 1

    def begin(self) -> int:
        """The number of the operation that begins now."""
        self._epoch += 1
        return self._epoch

    def share(
        self, head: tuple[int, ...], payload: npt.NDArray[np.int64], operation: str
    ) -> tuple[npt.NDArray[np.int64], bool]:
        """Publish this rank's record; everybody's, int64 `[P, record_len]`, and whether all are
        ready for the same."""
        record = self._peers[self._rank].record
        record[:HEADER] = head
        record[HEADER : HEADER + payload.size] = payload
        self.reach(Stage.PUBLISHED)
        self.wait_all(Stage.PUBLISHED, operation)
        records, alike = collect(self._records, record.size, ALIKE.stop)
        return records, alike and records[0, Field.STATUS] == Status.READY

    def tell_growth(self, base: int, capacity: int, status: Status) -> None:
        """Publish the block reserved after growing."""
        self._peers[self._rank].growth[:] = base, capacity, status
        self.reach(Stage.GROWN)

    def growth(self, rank: int, operation: str) -> tuple[int, int, Status]:
        """Base, capacity and status that a rank published after growing."""
        self._wait(rank, Stage.GROWN, operation)
        base, capacity, status = self._peers[rank].growth.tolist()
        return base, capacity, Status(status)

    def share_text(self, text: str, operation: str) -> list[str]:
        """Tell everybody what is wrong here; what everybody tells."""
        encoded = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
        self._peers[self._rank].text[:] = np.frombuffer(encoded, dtype=np.uint8)
        self.reach(Stage.TOLD)
        self.wait_all(Stage.TOLD, operation)
        texts = [peer.text.tobytes() for peer in self._peers]
        return [each.decode(errors="ignore").rstrip() for each in texts]

    def reach(self, stage: int) -> None:
        """Publish that this rank has come to a stage, and all that it wrote before."""
        address = self.mapping.address + self._layout.progress
        publish(address, self._value(stage))
        futex.wake(address)

    def wait_all(self, stage: int, operation: str) -> None:
        """Until all ranks have come to a stage of this operation.

        Raises:
            PeerError: a rank died, closed, or did not come in time.
        """
        value = self._value(stage)
        while (rank := first_behind(self._flags, value, self._spins)) >= 0:
            self._wait(rank, stage, operation)

    def close(self, lost: int | None) -> None:
        """Tell the others that this rank is gone, and which rank of the group it lost, if any."""
        state = _CLOSED if lost is None else _LOST + lost
        publish(self.mapping.address + self._layout.state, state)
        futex.wake(self.mapping.address + self._layout.progress)
        for peer in self._peers:
            peer.close()
        self._peers.clear()

    def _value(self, stage: int) -> int:
        return int(wrapped_difference(self._epoch * _STAGES + stage, 0))

    def _wait(self, rank: int, stage: int, operation: str) -> None:
        peer, value = self._peers[rank], self._value(stage)
        flag = peer.mapping.address + self._layout.progress
        seen = spin(flag, value, self._spins)
        if wrapped_difference(seen, value) >= 0:
            return
        start = time.monotonic()
        deadline = start + self._timeout_s
        while wrapped_difference(seen, value) < 0:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                what = f"did not arrive within {self._timeout_s:g} s"
                raise self._error(operation, self._ranks[rank], f"{what} ({self._progress(rank)})")
            futex.wait(flag, seen, min(left_s, _LOOK_EVERY_S))
            before = seen
            seen = spin(flag, value, 1)
            if seen == before:
                self._look_after(rank, value, operation)
        self._wait_s[self._ranks[rank]] += time.monotonic() - start

    def _look_after(self, rank: int, value: int, operation: str) -> None:
        """Raise if the rank waited for will never come, naming the rank to blame."""
        for other, peer in enumerate(self._peers):
            # A rank that has done its part may end before others have.
            if peer.has_ended() and wrapped_difference(self._seen(other), value) < 0:
                what = f"has died ({self._progress(other)})"
                raise self._error(operation, self._ranks[other], what)
        state = spin(self._peers[rank].mapping.address + self._layout.state, _CLOSED, 1)
        if state >= _LOST:
            lost = state - _LOST
            what = f"is lost, as rank {self._ranks[rank]} has found"
            raise self._error(operation, lost, what)
        if state == _CLOSED:
            raise self._error(operation, self._ranks[rank], "has closed its Shuffle")

    def _error(self, operation: str, rank: int, what: str) -> PeerError:
        here = f"rank {self._ranks[self._rank]} waited in operation {self._epoch}"
        return PeerError(
            f"{operation}: rank {rank} {what}; {here}; "
            "this Shuffle is closed for good, restart the ranks",
            operation=operation,
            rank=rank,
        )

    def _seen(self, rank: int) -> int:
        return int(spin(self._peers[rank].mapping.address + self._layout.progress, 0, 1))

    def _progress(self, rank: int) -> str:
        epoch, stage = divmod(self._seen(rank), _STAGES)
        if stage == 0:
            return "it has begun no operation"
        if Stage.STEP <= stage < Stage.DONE:
            return f"it came to step {stage - Stage.STEP} of operation {epoch}"
        return f"it came to {Stage(stage).name.lower()} of operation {epoch}"


class _Peer:
    """A rank's control block, mapped here, and its process."""

    def __init__(self, mapping: Mapping, process: int, layout: _Layout) -> None:
        self.mapping = mapping
        whole = mapping.bytes
        self.record = whole[layout.record :][: layout.record_len * 8].view(np.int64)
        self.growth = whole[layout.growth :][: 3 * 8].view(np.int64)
        self.text = whole[layout.text :][:TEXT_BYTES]
        self._process = os.pidfd_open(process)
        self._poll = select.poll()
        self._poll.register(self._process, select.POLLIN)

    def has_ended(self) -> bool:
        return bool(self._poll.poll(0))

    def close(self) -> None:
        os.close(self._process)
        os.close(self.mapping.file)
