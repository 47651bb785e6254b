"""One rank's place among the ranks of its host: windows, control blocks, and agreement."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from fusco.engines.agreement import Call, Made, disagreement, make_on_all
from fusco.engines.base import World
from fusco.engines.cpu.control import Control, Stage
from fusco.engines.cpu.kernels.reduce import new_terms
from fusco.engines.cpu.kernels.warm import warm_up
from fusco.engines.cpu.plans import Tables
from fusco.engines.cpu.window import Mapping, Window
from fusco.engines.mail import share_text
from fusco.errors import EngineUnavailableError, WindowMemoryError
from fusco.layout.blocks import Ints
from fusco.layout.heap import NOTHING, Block
from fusco.layout.records import HEADER, Field, Status
from fusco.transports.mailbox import Mailbox

_INITIAL_WINDOW_BYTES = 1 << 20
_BASE, _CAPACITY = int(Field.BASE), int(Field.CAPACITY)
_warm_up_once = functools.cache(warm_up)


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreement:
    """What all ranks have agreed on.

    Attributes:
        operation: its name, for errors.
        block: this rank's block, for what it receives.
        base: int64 `[P]`, where each rank's block begins in its window, bytes.
        capacity: int64 `[P]`, the size of each rank's block, bytes.
        payload: int64 `[P, payload]`, what each rank published.
    """

    operation: str
    block: Block
    base: Ints
    capacity: Ints
    payload: npt.NDArray[np.int64]

    def placed(self, block: Block, base: Ints) -> Agreement:
        """The same with other places."""
        return Agreement(
            operation=self.operation,
            block=block,
            base=base,
            capacity=self.capacity,
            payload=self.payload,
        )


class Session:
    """Windows of all ranks, and the protocol by which every operation begins and ends.

    Attributes:
        addresses: int64 `[P]`, where each rank's window is mapped here.
        sizes: int64 `[P]`, how much of it.
        tables: of the topology.
        terms: scratch memory of sums, by what they are taken in.

    Args:
        world: what it is made for.
        wait_s: by rank, where to add up the seconds waited.
        ranks: those that share this memory; None: the whole group. Here a rank is named by its
            place among them.
    """

    def __init__(
        self, world: World, wait_s: list[float], ranks: tuple[int, ...] | None = None
    ) -> None:
        self.world = world
        self._ranks = tuple(range(world.topology.num_ranks)) if ranks is None else ranks
        self.rank = self._ranks.index(world.topology.rank)
        mailbox = Mailbox(world.group, world.making_timeout_s, wait_s, world.channel)
        # One rank compiles the kernels, then the others find them on disk.
        self._on_all(mailbox, lambda: None if self.rank else _warm_up_once())
        self.window, self.control = self._on_all(mailbox, lambda: self._make_memory(wait_s))
        self._windows = self._connect(mailbox)
        self.addresses = np.array([mapping.address for mapping in self._windows])
        self.sizes = np.array([mapping.size for mapping in self._windows])
        self.tables = Tables.of(world)
        self.terms: dict[type, Any] = {
            wide: new_terms(world.top_k, wide) for wide in (np.float32, np.float64)
        }

    def _on_all(self, mailbox: Mailbox, make: Callable[[], Made]) -> Made:
        made, problems = make_on_all(
            make, lambda text: share_text(mailbox, text, "Shuffle", self._ranks), self._ranks
        )
        if problems:
            raise EngineUnavailableError(
                f"Shuffle: engine 'cpu' cannot be made on all ranks ({problems}); they must run as "
                "one user and have memory left, or use engine='reference'"
            )
        return cast(Made, made)

    def _make_memory(self, wait_s: list[float]) -> tuple[Window, Control]:
        _warm_up_once()
        world = self.world
        control = Control(self._ranks, self.rank, world.record_len, world.timeout_s, wait_s)
        return Window(_INITIAL_WINDOW_BYTES), control

    def _connect(self, mailbox: Mailbox) -> list[Mapping]:
        mine = [os.getpid(), self.control.mapping.file, self.window.mapping.file]
        theirs = mailbox.share(torch.tensor(mine), self._ranks, operation="Shuffle")
        processes, controls, windows = theirs.T.tolist()

        def open_all(files: list[int]) -> list[Mapping]:
            return [Mapping.open(*each) for each in zip(processes, files, strict=True)]

        def connect() -> list[Mapping]:
            self.control.connect(open_all(controls), processes)
            return open_all(windows)

        # Once all have connected any may end.
        return self._on_all(mailbox, connect)

    def agree(self, call: Call, block: Block, payload: npt.NDArray[np.int64]) -> Agreement:
        """Publish what this rank is about to do and where it can receive; what all say.

        Raises:
            InputError, DisagreementError, WindowMemoryError: on all ranks.
            PeerError: a rank did not come.
        """
        control, operation = self.control, call.operation.text
        head = call.head(control.begin(), block.base, block.size)
        records, agreed = control.share(head, payload, operation)
        if not agreed:
            self.window.heap.release(block)
            texts = control.share_text(call.text, operation)
            raise disagreement(call, records, texts, self.rank)
        return Agreement(
            operation=operation,
            block=block,
            base=records[:, _BASE],
            capacity=records[:, _CAPACITY],
            payload=records[:, HEADER:],
        )

    def reserve(self, call: Call, size: int) -> tuple[Call, Block]:
        """A block for what this rank will receive; a lack of memory becomes the call's error."""
        try:
            return call, self.window.reserve(size)
        except MemoryError as error:
            return call.failed(_no_memory(call.operation.text, error)), NOTHING

    def fit(self, agreement: Agreement, needs: Ints) -> Agreement:
        """Shrink this rank's block to its need; where one is too small its rank grows its window,
        and all ranks learn the new place.

        Args:
            agreement: with blocks reserved before needs were known.
            needs: int64 `[P]`, bytes each rank needs, the same on all ranks.
        """
        short = needs > agreement.capacity
        own, heap = agreement.block, self.window.heap
        if not short[self.rank]:
            own = heap.shrink(own, int(needs[self.rank]))
        if not short.any():
            return agreement.placed(own, agreement.base)
        problem: MemoryError | None = None
        if short[self.rank]:
            heap.release(own)
            own = NOTHING
            try:
                own = self.window.reserve(int(needs[self.rank]))
            except MemoryError as error:
                problem = error
            status = Status.READY if problem is None else Status.NO_MEMORY
            self.control.tell_growth(own.base, own.size, status)
        base = agreement.base.copy()
        for rank in np.flatnonzero(short).tolist():
            base[rank], _, status = self.control.growth(rank, agreement.operation)
            if status != Status.READY:
                heap.release(own)
                # All ranks come here, so that none publishes again while another still reads.
                self.control.meet(Stage.DONE, agreement.operation)
                text = problem or f"rank {rank}: no memory left to grow its window"
                raise _no_memory(agreement.operation, text)
        return agreement.placed(own, base)

    def map(self, ends: Ints) -> None:
        """Have each rank's window mapped at least up to byte `ends[p]`."""
        for rank in np.flatnonzero(ends > self.sizes).tolist():
            mapping = self._windows[rank] = self._windows[rank].remapped()
            self.addresses[rank], self.sizes[rank] = mapping.address, mapping.size

    def finish(self, agreement: Agreement) -> None:
        """Until all ranks have written all that they write in this operation."""
        self._meet(Stage.DONE, agreement)

    def leave(self, agreement: Agreement) -> None:
        """Until all ranks have read all that they read in this operation."""
        self._meet(Stage.READ, agreement)

    def _meet(self, stage: Stage, agreement: Agreement) -> None:
        self.control.meet(stage, agreement.operation)

    def close(self, lost: int | None) -> None:
        self.control.close(lost)
        for mapping in self._windows:
            os.close(mapping.file)
        self._windows.clear()
        self.window.close()
        os.close(self.control.mapping.file)


def _no_memory(operation: str, what: object) -> WindowMemoryError:
    return WindowMemoryError(
        f"{operation}: {what}; free memory, dispatch fewer tokens, or balance the routing"
    )
