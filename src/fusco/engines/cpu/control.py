"""The control block: what each rank publishes, and how the others wait for it."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from fusco.engines.base import TEXT_BYTES
from fusco.engines.cpu.kernels.memory import collect
from fusco.engines.cpu.kernels.waiting import COME, look, meet, publish, share, wait
from fusco.engines.cpu.window import Mapping
from fusco.errors import PeerError
from fusco.layout.blocks import Ints
from fusco.layout.heap import ALIGNMENT, align
from fusco.layout.records import ALIKE, HEADER, Field, Status

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


_PROGRESS = {
    Stage.PUBLISHED: "has begun",
    Stage.GROWN: "has made room for",
    Stage.TOLD: "has told its error in",
    Stage.DONE: "has written all of",
    Stage.READ: "is done with",
}
_OPEN, _CLOSED, _LOST = 0, 1, 2
# Plain numbers, since enumerations take compiled loops and arrays ten times as long.
_NUM_ALIKE, _STATUS, _READY = int(ALIKE.stop), int(Field.STATUS), int(Status.READY)


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

    Attributes:
        epoch: the number of the operation that goes on, or was the last.

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
        self.epoch = 0
        self._waited = np.zeros(len(ranks))
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
        self._flag = int(self._flags[self._rank])
        cores = len(os.sched_getaffinity(0))
        # A rank that spins keeps a core from the rank it waits for, where there are too few.
        self._spins = _SPINS if len(mappings) <= cores else 1

    def begin(self) -> int:
        """The number of the operation that begins now."""
        self.epoch += 1
        return self.epoch

    def share(self, head: tuple[int, ...], payload: Ints, operation: str) -> tuple[Ints, bool]:
        """Publish this rank's record; everybody's, int64 `[P, record_len]`, and whether all are
        ready for the same."""
        record = self._peers[self._rank].record
        record[:HEADER] = head
        record[HEADER : HEADER + payload.size] = payload
        size = record.size
        behind, records, alike = share(
            self._flag,
            self._flags,
            self._value(Stage.PUBLISHED),
            self._spins,
            self._waited,
            self._records,
            size,
            _NUM_ALIKE,
        )
        if behind != COME:
            self._wait_on(behind, slice(None), Stage.PUBLISHED, operation)
            if behind >= 0:
                records, alike = collect(self._records, size, _NUM_ALIKE)
        return records, alike and records[0, _STATUS] == _READY

    def tell_growth(self, base: int, capacity: int, status: Status) -> None:
        """Publish the block reserved after growing."""
        self._peers[self._rank].growth[:] = base, capacity, status
        self.reach(Stage.GROWN)

    def growth(self, rank: int, operation: str) -> tuple[int, int, Status]:
        """Base, capacity and status that a rank published after growing."""
        self._wait(slice(rank, rank + 1), Stage.GROWN, operation)
        base, capacity, status = self._peers[rank].growth.tolist()
        return base, capacity, Status(status)

    def share_text(self, text: str, operation: str) -> list[str]:
        """Tell everybody what is wrong here; what everybody tells."""
        encoded = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
        self._peers[self._rank].text[:] = np.frombuffer(encoded, dtype=np.uint8)
        self.meet(Stage.TOLD, operation)
        texts = [peer.text.tobytes() for peer in self._peers]
        return [each.decode(errors="ignore").rstrip() for each in texts]

    def reach(self, stage: int) -> None:
        """Publish that this rank has come to a stage, and all that it wrote before."""
        publish(self._flag, self._value(stage))

    def wait_all(self, stage: int, operation: str) -> None:
        """Until all ranks have come to a stage of this operation.

        Raises:
            PeerError: a rank died, closed, or did not come in time.
        """
        self._wait(slice(None), stage, operation)

    def meet(self, stage: int, operation: str) -> None:
        """`reach` and `wait_all`."""
        value = self._value(stage)
        behind = meet(self._flag, self._flags, value, self._spins, self._waited)
        if behind != COME:
            self._wait_on(behind, slice(None), stage, operation)

    def close(self, lost: int | None) -> None:
        """Tell the others that this rank is gone, and which rank of the group it lost, if any."""
        state = _CLOSED if lost is None else _LOST + lost
        publish(self.mapping.address + self._layout.state, state)
        publish(self._flag, look(self._flag))  # wakes who waits for this rank
        for peer in self._peers:
            peer.close()
        self._peers.clear()

    def _value(self, stage: int) -> int:
        return _wrap(self.epoch * _STAGES + stage)

    def _wait(self, ranks: slice, stage: int, operation: str) -> None:
        value = self._value(stage)
        behind = wait(self._flags[ranks], value, self._spins, self._waited[ranks])
        if behind != COME:
            self._wait_on(behind, ranks, stage, operation)

    def _wait_on(self, behind: int, ranks: slice, stage: int, operation: str) -> None:
        """What is left to do of a wait for some ranks that was not over at once."""
        value, flags, waited = self._value(stage), self._flags[ranks], self._waited[ranks]
        deadline, is_late = time.monotonic() + self._timeout_s, False
        while behind >= 0:
            rank = behind + (ranks.start or 0)
            self._look_after(rank, value, operation)
            if is_late:
                what = f"did not arrive within {self._timeout_s:g} s"
                raise self._error(operation, self._ranks[rank], f"{what} ({self._progress(rank)})")
            # Once more in the end, for it may be this rank that was stopped for so long.
            is_late = time.monotonic() > deadline
            behind = wait(flags, value, 1, waited)
        for rank, seconds in zip(self._ranks[ranks], waited.tolist(), strict=True):
            self._wait_s[rank] += seconds
        waited[:] = 0

    def _look_after(self, rank: int, value: int, operation: str) -> None:
        """Raise if the rank waited for, or one that has ended, will never come, naming the rank to
        blame."""
        for other, peer in enumerate(self._peers):
            has_ended = peer.has_ended()
            if other != rank and not has_ended:
                continue
            state = look(peer.mapping.address + self._layout.state)
            # Looked at last: it may have come, left and ended since the wait for it was given up.
            if _wrap(self._seen(other) - value) >= 0:
                continue
            blamed, what = self._ranks[other], ""
            if state >= _LOST:
                blamed = state - _LOST
                what = f"is lost, as rank {self._ranks[other]} has found"
                if blamed == self._ranks[other]:
                    what = "has left after an error of its own"
            elif state == _CLOSED:
                what = "has closed its Shuffle"
            elif has_ended:
                what = f"has died ({self._progress(other)})"
            if what:
                raise self._error(operation, blamed, what)

    def _error(self, operation: str, rank: int, what: str) -> PeerError:
        here = f"rank {self._ranks[self._rank]} waited in operation {self.epoch}"
        return PeerError(
            f"{operation}: rank {rank} {what}; {here}; "
            "the group cannot go on without it, restart the ranks",
            operation=operation,
            rank=rank,
        )

    def _seen(self, rank: int) -> int:
        return int(look(self._flags[rank]))

    def _progress(self, rank: int) -> str:
        epoch, stage = divmod(self._seen(rank), _STAGES)
        if stage == 0:
            return "it has begun no operation"
        if Stage.STEP <= stage < Stage.DONE:
            return f"it came to step {stage - Stage.STEP} of operation {epoch}"
        return f"it {_PROGRESS[Stage(stage)]} operation {epoch}"


def _wrap(value: int) -> int:
    """In int32, where counters wrap around."""
    return (value + 2**31) % 2**32 - 2**31


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
