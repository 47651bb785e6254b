"""GPUs of one host as the node of a larger group, by operators of torch on each other's memory.

The links between nodes are slower than all that is done here by orders of magnitude, so there are
no kernels of our own. Ranks wait for each other on the host, after their streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from fusco.engines.agreement import Made, make_on_all
from fusco.engines.base import World
from fusco.engines.cuda.lists import by_rank, list_sums, scatter_rows
from fusco.engines.cuda.node_memory import CudaMemory, NodeHeap, NodeMemory
from fusco.engines.mail import share_text
from fusco.engines.node import Node, NodeBlocks
from fusco.layout.blocks import Ints, Sections
from fusco.layout.compact import chunk_bytes
from fusco.layout.heap import Block, align
from fusco.layout.segments import as_bytes, bytes_per_row, from_segments
from fusco.transports.mailbox import Mailbox
from fusco.transports.progress import Progress


class CudaNode(Node):
    """Ranks whose GPUs reach each other's memory.

    Args:
        world: what the engine is made for.
        wait_s: by rank of the group, where to add up the seconds waited.
        ranks: of the node.
        make_memory: where its memory comes from.
    """

    def __init__(
        self,
        world: World,
        wait_s: list[float],
        ranks: tuple[int, ...],
        make_memory: Callable[[World, tuple[int, ...]], NodeMemory] = CudaMemory,
    ) -> None:
        self.ranks = ranks
        self._mailbox = Mailbox(world.group, world.timeout_s, wait_s, world.channel)
        self._memory = make_memory(world, ranks)
        self._place = ranks.index(world.topology.rank)
        self._heap = NodeHeap(self._memory, self._place)

    @property
    def device(self) -> torch.device:
        return self._memory.device

    @property
    def window_bytes(self) -> int:
        return self._heap.num_bytes

    def reserve(self, size: int) -> Block:
        return self._heap.free.shrink(self.reserve_largest(), size)

    def reserve_largest(self) -> Block:
        self._memory.begin()
        block = self._heap.free.reserve_largest()
        # What was done with it before is over when others know of it, who then write.
        self._memory.settle()
        return block

    def fit(self, operation: str, block: Block, needs: Ints, capacity: Ints) -> Block:
        need, is_short = int(needs[self._place]), needs > capacity
        if is_short[self._place]:
            self._heap.free.release(block)
        else:
            block = self._heap.free.shrink(block, need)
        if not is_short.any():
            return block
        try:
            self._grow(operation, chunk_bytes(int(needs[is_short].max())))
        except MemoryError:
            if not is_short[self._place]:
                self._heap.free.release(block)
            raise
        if is_short[self._place]:
            block = self.reserve(need)
        return block

    @torch.inference_mode(False)
    def _grow(self, operation: str, size: int) -> None:
        memory = self._on_all(
            operation,
            lambda: self._memory.allocate(size),
            f"no {size} bytes more for the windows of a node",
        )
        # Of a GPU that a rank cannot see, this is the first to tell that it is not reached.
        parts = self._on_all(
            operation,
            lambda: self._memory.connect(memory),
            f"not every rank of a node can map the others' {size} bytes more for the windows, see "
            "`fusco doctor` for peer access",
        )
        self._heap.add(parts)

    def _on_all(self, operation: str, make: Callable[[], Made], failure: str) -> Made:
        """What is made, if all ranks of the node make theirs; else all raise a MemoryError."""
        made, problems = make_on_all(
            make, lambda text: share_text(self._mailbox, text, operation, self.ranks), self.ranks
        )
        if problems:
            raise MemoryError(f"{failure} ({problems})")
        return cast(Made, made)

    def release(self, block: Block) -> None:
        self._heap.free.release(block)

    def open(self, operation: str, block: Block, base: Ints, sections: Sections) -> NodeBlocks:
        mates = [rank for place, rank in enumerate(self.ranks) if place != self._place]
        progress = Progress(self._mailbox, mates, operation)
        return _CudaBlocks(self, block, base, sections, progress)

    def sum_rows(
        self, rows: Tensor, weights: Tensor | None, list_ptr: Tensor, item: Tensor, out: Tensor
    ) -> None:
        flat = out.view(list_ptr.shape[0] - 1, rows.shape[1:].numel())
        for order, sums in list_sums(rows, weights, list_ptr, item):
            flat.index_copy_(0, order, sums)

    def close(self, lost: int | None = None) -> None:
        # Memory goes with the last tensor over it.
        self._heap = NodeHeap(self._memory, self._place)


class _CudaBlocks(NodeBlocks):
    """See `NodeBlocks`."""

    def __init__(
        self, node: CudaNode, block: Block, base: Ints, sections: Sections, progress: Progress
    ) -> None:
        self._heap, self._memory = node._heap, node._memory
        self._ranks, self._place = node.ranks, node._place
        self._block = block
        self._start = sections.start[:, self._place].tolist()
        self._progress = progress
        self._parts = [
            self._heap.parts(base, start, size)
            for start, size in zip(sections.start, sections.size, strict=True)
        ]

    def scatter(
        self,
        section: int,
        rows: Tensor,
        row: Tensor | None,
        slot_ptr: Tensor,
        slot: Tensor,
        target: Tensor,
    ) -> None:
        first, last = torch.stack((slot_ptr[0], slot_ptr[-1])).tolist()
        slot, target = slot[first:last], target[first:last]
        if row is None:
            row = torch.arange(slot_ptr.shape[0] - 1, device=slot.device)
        source = torch.repeat_interleave(row, slot_ptr.diff(), output_size=last - first)
        for mate, chosen in by_rank(target, self._ranks):
            part = self._parts[section][mate]
            if chosen is None:
                scatter_rows(rows, source, slot, part)
            else:
                scatter_rows(rows, source[chosen], slot[chosen], part)

    def put(self, section: int, target: int, first: int, rows: Tensor) -> None:
        begin = first * bytes_per_row(rows)
        part = self._parts[section][self._ranks.index(target)]
        part[begin : begin + rows.nbytes].copy_(as_bytes(rows.contiguous()))

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
        for order, sums in list_sums(rows, weights, list_ptr, item):
            to = place[order]
            for mate, chosen in by_rank(target[order], self._ranks):
                out = _rows_of(self._parts[section][mate], sums)
                if chosen is None:
                    out.index_copy_(0, to, sums)
                else:
                    out.index_copy_(0, to[chosen], sums[chosen])

    def reach(self, step: int) -> None:
        self._memory.settle()
        self._progress.reach(step)

    def wait(self, step: int) -> None:
        self._progress.wait(step)

    def finish(self) -> None:
        self._memory.settle()
        self._progress.finish()

    def view(self, section: int, like: Tensor) -> Tensor:
        return _rows_of(self._parts[section][self._place], like)

    def keep(self, kept: int) -> list[Tensor]:
        end, tensors = 0, []
        for start, parts in zip(self._start[:kept], self._parts[:kept], strict=True):
            own = parts[self._place]
            part = Block(base=self._block.base + start, size=align(own.numel()))
            tensors.append(self._heap.lend(part, own))
            end = start + part.size
        self._heap.free.release(Block(base=self._block.base + end, size=self._block.size - end))
        return tensors


def _rows_of(part: Tensor, like: Tensor) -> Tensor:
    return from_segments(part.view(-1, bytes_per_row(like)), like)
