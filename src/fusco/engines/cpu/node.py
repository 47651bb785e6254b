"""The CPU engine as the node of a larger group: windows of shared memory among its own ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusco.engines.base import World
from fusco.engines.cpu.combine import ELEMENTS
from fusco.engines.cpu.control import Stage
from fusco.engines.cpu.kernels.lists import scatter_lists, sum_lists
from fusco.engines.cpu.kernels.memory import copy
from fusco.engines.cpu.kernels.reduce import new_terms
from fusco.engines.cpu.session import Agreement, Session
from fusco.engines.node import Node, NodeBlocks
from fusco.layout.blocks import Ints, Sections
from fusco.layout.heap import Block, align
from fusco.layout.segments import bytes_per_row, from_segments

_NO_ROWS = np.empty(0, dtype=np.int64)


class CpuNode(Node):
    """Ranks of one host."""

    def __init__(self, world: World, wait_s: list[float], ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self._top_k = world.top_k
        self._num_ranks = world.topology.num_ranks
        self._session = Session(world, wait_s, ranks)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def window_bytes(self) -> int:
        return self._session.window.mapping.size

    def reserve(self, size: int) -> Block:
        return self._session.window.reserve(size)

    def reserve_largest(self) -> Block:
        return self._session.window.reserve_largest()

    def fit(self, operation: str, block: Block, needs: Ints, capacity: Ints) -> Block:
        window, place = self._session.window, self._session.rank
        need = int(needs[place])
        if need <= capacity[place]:
            return window.heap.shrink(block, need)
        window.heap.release(block)
        return window.reserve(need)

    def release(self, block: Block) -> None:
        self._session.window.heap.release(block)

    def open(self, operation: str, block: Block, base: Ints, sections: Sections) -> NodeBlocks:
        agreement = Agreement(
            operation=operation,
            block=block,
            base=base,
            capacity=sections.total,
            payload=np.empty((0, 0), dtype=np.int64),
        )
        self._session.control.begin()
        self._session.map(base + sections.total)
        own = sections.start + self._session.addresses + base
        at = np.zeros((own.shape[0], self._num_ranks), dtype=np.int64)
        at[:, self.ranks] = own
        return _CpuBlocks(self._session, agreement, sections, at, self._top_k)

    def sum_rows(
        self, rows: Tensor, weights: Tensor | None, list_ptr: Tensor, item: Tensor, out: Tensor
    ) -> None:
        count = list_ptr.shape[0] - 1
        base = np.array([out.data_ptr()])
        target = np.zeros(count, dtype=np.int64)
        _sum(rows, weights, list_ptr, item, target, np.arange(count), base, self._top_k)

    def close(self, lost: int | None = None) -> None:
        self._session.close(lost)


class _CpuBlocks(NodeBlocks):
    """See `NodeBlocks`. `at` is the address of every section on every rank of the group; 0 where
    it is on another node."""

    def __init__(
        self, session: Session, agreement: Agreement, sections: Sections, at: Ints, top_k: int
    ) -> None:
        self._session = session
        self._agreement = agreement
        self._start = sections.start[:, session.rank].tolist()
        self._size = sections.size[:, session.rank].tolist()
        self._at = at
        self._top_k = top_k

    def scatter(
        self,
        section: int,
        rows: Tensor,
        row: Tensor | None,
        slot_ptr: Tensor,
        slot: Tensor,
        target: Tensor,
    ) -> None:
        dense = rows.contiguous()
        scatter_lists(
            dense.data_ptr(),
            bytes_per_row(dense),
            _NO_ROWS if row is None else row.numpy(),
            slot_ptr.numpy(),
            slot.numpy(),
            target.numpy(),
            self._at[section],
        )

    def put(self, section: int, target: int, first: int, rows: Tensor) -> None:
        dense = rows.contiguous()
        to = self._at[section, target] + first * bytes_per_row(dense)
        copy(to, dense.data_ptr(), dense.nbytes)

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
        base = self._at[section]
        _sum(rows, weights, list_ptr, item, target.numpy(), place.numpy(), base, self._top_k)

    def reach(self, step: int) -> None:
        stage = Stage.STEP + step
        assert stage < Stage.DONE, "it would be told as the end, or as the next operation"
        self._session.control.reach(stage)

    def wait(self, step: int) -> None:
        self._session.control.wait_all(Stage.STEP + step, self._agreement.operation)

    def finish(self) -> None:
        self._session.finish(self._agreement)

    def view(self, section: int, like: Tensor) -> Tensor:
        block, size = self._agreement.block, self._size[section]
        view = self._session.window.view(block, self._start[section], size, np.uint8)
        return from_segments(torch.from_numpy(view).view(-1, bytes_per_row(like)), like)

    def keep(self, kept: int) -> list[Tensor]:
        window, block = self._session.window, self._agreement.block
        end, tensors = 0, []
        for start, size in zip(self._start[:kept], self._size[:kept], strict=True):
            part = Block(base=block.base + start, size=align(size))
            tensors.append(window.as_tensor(part, size))
            end = start + part.size
        window.heap.release(Block(base=block.base + end, size=block.size - end))
        return tensors


def _sum(
    rows: Tensor,
    weights: Tensor | None,
    list_ptr: Tensor,
    item: Tensor,
    target: Ints,
    place: Ints,
    base: Ints,
    top_k: int,
) -> None:
    dense = rows.contiguous()
    weights = None if weights is None else weights.contiguous()
    like, wide = ELEMENTS[rows.dtype]
    sum_lists(
        like,
        bytes_per_row(dense),
        dense.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        list_ptr.numpy(),
        item.numpy(),
        target,
        place,
        base,
        new_terms(top_k, wide),
    )
