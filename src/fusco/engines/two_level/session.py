"""One rank's place in a group of nodes: its node, its mail, its slices, and agreement."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fusco.engines.agreement import Call, make_on_all
from fusco.engines.base import VALUE_ROW_BYTES, World
from fusco.engines.mail import share_records, share_text
from fusco.engines.node import Node, NodeBlocks
from fusco.engines.sliced import SlicedPlanner
from fusco.engines.two_level.lanes import SliceSize, most_lanes
from fusco.errors import (
    DisagreementError,
    EngineUnavailableError,
    InputError,
    PeerError,
    WindowMemoryError,
)
from fusco.layout.blocks import Ints, Sections
from fusco.layout.heap import NOTHING, Block, align
from fusco.layout.records import HEADER, Field, Status
from fusco.transports.mailbox import Mailbox
from fusco.transports.slices import SliceTransport
from fusco.transports.wires import Wire, open_wire, slice_bytes

Made = TypeVar("Made")
Part = TypeVar("Part", Node, SliceTransport)

DEPTH = 3
"""Slices on their way to and from each peer: one is loaded, one travels, one waits."""
_MOST_SLICES = 1 << 14
"""Of a rank's tokens; the engine "cpu" can tell of four times as many steps in an operation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreement:
    """What all ranks have agreed on.

    Attributes:
        operation: its name, for errors.
        block: this rank's block, for what it receives.
        base: int64 `[P]`, where each rank's block begins in its memory, bytes.
        payload: int64 `[P, payload]`, what each rank published.
    """

    operation: str
    block: Block
    base: Ints
    payload: Tensor


class Session:
    """A node of this rank, and what joins it to the others.

    Args:
        world: what it is made for.
        make_node: see `TwoLevelEngine`.
        make_planner: see `TwoLevelEngine`.
        wait_s: by rank, where to add up the seconds waited.

    Attributes:
        epoch: how often ranks have been asked to agree.
    """

    def __init__(
        self,
        world: World,
        make_node: Callable[[World, list[float], tuple[int, ...]], Node],
        make_planner: Callable[[World], SlicedPlanner],
        wait_s: list[float],
    ) -> None:
        topology = world.topology
        self.world = world
        self.mailbox = Mailbox(world.group, world.timeout_s, wait_s, world.channel)
        mates = (rank for rank, node in enumerate(topology.node_of_rank) if node == topology.node)
        self.node = self._on_all(lambda: make_node(world, wait_s, tuple(mates)))
        self.planner = make_planner(world)
        most_segments = 1 if world.ablation.deduplicate else world.top_k
        wanted = slice_bytes(self.node.device, topology.num_nodes)
        # Rows that values return beside may be wider than any that are dispatched.
        row_bytes = max(world.row_bytes, VALUE_ROW_BYTES)
        fitting = wanted // (row_bytes * most_segments)
        tokens = max(1, fitting, -(-world.max_tokens // _MOST_SLICES))
        # No slice is larger than all there is to send.
        tokens = min(tokens, max(world.max_tokens, 1))
        self.size = SliceSize(tokens=tokens, rows=tokens * most_segments)
        slot_bytes = align(self.size.rows * row_bytes)
        try:
            self.transport = self._on_all(lambda: self._make_transport(slot_bytes))
        except BaseException:
            self.node.close()
            raise
        self.epoch = 0
        self._process = os.getpid()
        self.is_closed = False

    def _on_all(self, make: Callable[[], Part]) -> Part:
        """What is made, if all ranks make theirs; else all raise the same error."""
        world, wait_s = self.world, self.mailbox.wait_s
        mailbox = Mailbox(world.group, world.making_timeout_s, wait_s, world.channel)
        try:
            made, problems = make_on_all(
                make, lambda text: share_text(mailbox, text, "Shuffle"), untold=(PeerError,)
            )
        except PeerError as error:
            mailbox.notices.tell(error.rank)
            mailbox.notices.hang_up()
            raise
        if made is None or problems:
            if made is not None:
                made.close()
            raise EngineUnavailableError(
                f"Shuffle: engine 'two_level' cannot be made on all ranks ({problems}); use "
                "engine='reference'"
            )
        return made

    def _make_transport(self, slot_bytes: int) -> SliceTransport:
        world = self.world
        lanes = most_lanes(world.topology, forwarders=world.ablation.deduplicate)
        return SliceTransport(
            world.group,
            self._open_wire(),
            slot_bytes=slot_bytes,
            # The sums of the own node lie beside those that arrive.
            num_lanes=lanes + 1,
            depth=DEPTH,
            device=self.node.device,
            timeout_s=world.timeout_s,
            wait_s=self.mailbox.wait_s,
        )

    def _open_wire(self) -> Wire | None:
        """What joins the nodes; None where there is one."""
        topology = self.world.topology
        if topology.num_nodes == 1:
            return None
        away = [rank for rank, node in enumerate(topology.node_of_rank) if node != topology.node]
        try:
            return open_wire(self.world.group, self.node.device, away, self.world.channel)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}; make the group with backend='cpu:gloo,cuda:nccl'"
            ) from error

    def agree(
        self, call: Call, block: Block | None = None, payload: Tensor | None = None
    ) -> Tensor:
        """Everybody's records, int64 `[P, HEADER + payload]`, if all can go on together.

        Raises:
            InputError, DisagreementError, WindowMemoryError: on all ranks.
            PeerError: a rank did not come.
        """
        self.epoch += 1
        record = torch.zeros(self.world.record_len, dtype=torch.int64, device="cpu")
        place = (block.base, block.size) if block is not None else (0, 0)
        record[:HEADER] = torch.tensor(call.head(self.epoch, *place), device="cpu")
        if payload is not None:
            record[HEADER : HEADER + payload.shape[0]] = payload.cpu()
        try:
            return share_records(self.mailbox, call, record)
        except (InputError, DisagreementError, WindowMemoryError):
            if block is not None:
                self.node.release(block)
            raise

    def prepare(self, call: Call, make: Callable[[], Made]) -> tuple[Call, Made | None]:
        """What this rank needs before it has asked the others; a lack of memory becomes the call's
        error."""
        try:
            return call, make()
        except (MemoryError, RuntimeError) as error:  # torch has no type for a lack of the host's
            problem = _no_memory(call.operation.text, error)
            problem.__cause__ = error
            return call.failed(problem), None

    def reserve(self, call: Call, size: int) -> tuple[Call, Block]:
        """A block for what this rank will receive; a lack of memory becomes the call's error."""
        try:
            return call, self.node.reserve(size)
        except MemoryError as error:
            return call.failed(_no_memory(call.operation.text, error)), NOTHING

    def fit(self, call: Call, block: Block, records: Tensor, needs: Ints) -> Agreement:
        """Cut this rank's block to its need; where one is too small, its node reserves another,
        and all ranks learn the new place.

        Args:
            call: what was agreed on.
            block: of this rank.
            records: of all ranks.
            needs: int64 `[P]`, bytes each rank needs, the same on all ranks.
        """
        operation, mates = call.operation.text, list(self.node.ranks)
        capacity = records[:, Field.CAPACITY].numpy()
        problem: MemoryError | None = None
        try:
            block = self.node.fit(operation, block, needs[mates], capacity[mates])
        except MemoryError as error:
            block, problem = NOTHING, error
        agreement = Agreement(
            operation=operation,
            block=block,
            base=records[:, Field.BASE].numpy(),
            payload=records[:, HEADER:],
        )
        if not (needs > capacity).any():
            return agreement
        status = Status.READY if problem is None else Status.NO_MEMORY
        mine = torch.tensor([block.base, status], device="cpu")
        everybody = range(self.world.topology.num_ranks)
        places = self.mailbox.share(mine, everybody, operation=operation).numpy()
        if places[:, 1].any():
            self.node.release(block)
            culprit = int(np.flatnonzero(places[:, 1])[0])
            text = problem or f"rank {culprit}: no memory left to grow its window"
            raise _no_memory(operation, text)
        return replace(agreement, base=places[:, 0])

    def open(self, agreement: Agreement, sections: Sections) -> NodeBlocks:
        """Begin the operation on this node; `sections` are of all ranks of the node."""
        base = agreement.base[list(self.node.ranks)]
        return self.node.open(agreement.operation, agreement.block, base, sections)

    def close(self, lost: int | None) -> None:
        """Release everything. Idempotent."""
        was_closed, self.is_closed = self.is_closed, True
        # A forked child shares the memory, but must not speak for the rank.
        if was_closed or self._process != os.getpid():
            return
        if lost is not None:
            self.mailbox.notices.tell(lost)
        self.transport.close(is_lost=lost is not None)
        self.node.close(lost)
        if lost is not None:
            self.mailbox.notices.hang_up()


def _no_memory(operation: str, what: object) -> WindowMemoryError:
    return WindowMemoryError(
        f"{operation}: {what}; free memory, dispatch fewer tokens, or balance the routing"
    )
