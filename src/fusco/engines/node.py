"""What a node engine promises to an engine that joins nodes: memory of every rank of one node which
all of its ranks can write, rows scattered into it, and rows summed in the order of the contract.

An operation goes: `reserve` a block of the own memory; tell the others where it is and how large
(that is the business of whoever uses this); `fit` it to its need, once all needs are known; `open`
the operation with everybody's blocks; scatter, push and sum; `finish`. Blocks are divided into
sections, which hold rows of one size each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fusco.layout.blocks import Ints, Sections
from fusco.layout.heap import Block


class Node(ABC):
    """The ranks of one node, as one of them sees it.

    Attributes:
        ranks: their numbers in the group, ascending. Where an array has an entry a rank of the
            node, they are in this order.
    """

    ranks: tuple[int, ...]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tensors are that it takes: rows, lists and weights alike."""

    @property
    @abstractmethod
    def window_bytes(self) -> int:
        """The size of this rank's memory now."""

    @abstractmethod
    def reserve(self, size: int) -> Block:
        """A block of `size` bytes of this rank's memory, or a smaller one where the memory grows
        only together with that of others. What was there before is used no more.

        Raises:
            MemoryError: the system has not so much.
        """

    @abstractmethod
    def reserve_largest(self) -> Block:
        """The largest free block whole, for a need that is not known yet."""

    @abstractmethod
    def fit(self, operation: str, block: Block, needs: Ints, capacity: Ints) -> Block:
        """Cut a block to this rank's need, or reserve another where it is too small. All ranks of
        the node do, and know the same.

        Args:
            operation: what to call it in errors.
            block: of this rank.
            needs: `[ranks of the node]`, bytes.
            capacity: `[ranks of the node]`, the size of each rank's block, bytes.

        Raises:
            MemoryError: some rank's system has not so much; the block is released.
            PeerError: a rank did not come.
        """

    @abstractmethod
    def release(self, block: Block) -> None:
        """Give a block back."""

    @abstractmethod
    def open(self, operation: str, block: Block, base: Ints, sections: Sections) -> NodeBlocks:
        """Begin an operation; all ranks of the node do.

        Args:
            operation: what to call it in errors.
            block: of this rank.
            base: `[ranks of the node]`, where each rank's block begins, bytes.
            sections: of every rank's block.
        """

    @abstractmethod
    def sum_rows(
        self, rows: Tensor, weights: Tensor | None, list_ptr: Tensor, item: Tensor, out: Tensor
    ) -> None:
        """Sum listed rows: `out[i]` is the sum of `weights[j] * rows[j]` for j in list i, in its
        order, products rounded before they are added, in fp32 (fp64 for fp64), rounded once.

        Args:
            rows: floating `[R, ...]`.
            weights: float32 `[R]`; None: a plain sum.
            list_ptr: int64 `[n + 1]`, list i is `item[list_ptr[i]:list_ptr[i + 1]]`.
            item: int64.
            out: `[n, ...]`, of the dtype of `rows`.
        """

    @abstractmethod
    def close(self, lost: int | None = None) -> None:
        """Release everything; `lost` is the rank of the group whose loss is the reason."""


class NodeBlocks(ABC):
    """One operation's blocks of all ranks of a node. Ranks are named by their number in the
    group, rows by their place in a section."""

    @abstractmethod
    def scatter(
        self,
        section: int,
        rows: Tensor,
        row: Tensor | None,
        slot_ptr: Tensor,
        slot: Tensor,
        target: Tensor,
    ) -> None:
        """Write rows to all of their slots.

        Args:
            section: where to.
            rows: `[n, ...]`, of the section's row size.
            row: int64 `[segments]`, the row of each segment; None: segment i is row i.
            slot_ptr: int64 `[segments + 1]`, slots of segment i are `slot_ptr[i]:slot_ptr[i + 1]`.
            slot: int64, rows of the section.
            target: int64, the rank of each slot.
        """

    @abstractmethod
    def put(self, section: int, target: int, first: int, rows: Tensor) -> None:
        """Write rows to consecutive places of one rank, from `first` on."""

    @abstractmethod
    def push_sums(
        self,
        section: int,
        rows: Tensor,
        weights: Tensor | None,
        list_ptr: Tensor,
        item: Tensor,
        target: Tensor,
        place: Tensor,
    ) -> None:
        """As `Node.sum_rows`, but sum i goes to `place[i]` in the section of rank `target[i]`."""

    @abstractmethod
    def reach(self, step: int) -> None:
        """Tell the node that this rank has written all that belongs to steps 0 to `step`."""

    @abstractmethod
    def wait(self, step: int) -> None:
        """Until all ranks of the node have reached a step, or finished.

        Raises:
            PeerError: one died, or did not come in time.
        """

    @abstractmethod
    def finish(self) -> None:
        """Until all ranks have written all that they write in this operation."""

    @abstractmethod
    def view(self, section: int, like: Tensor) -> Tensor:
        """The own section as a tensor with the dtype and row shape of `like`; not to outlive the
        operation."""

    @abstractmethod
    def keep(self, kept: int) -> list[Tensor]:
        """The first `kept` own sections as uint8 `[bytes]`. Their memory is free again when the
        last tensor over it is; that of the other sections is free now."""
