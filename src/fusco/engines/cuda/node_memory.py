"""Memory that the ranks of a node write for each other, and the heap that shares it out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fusco.engines.base import World
from fusco.engines.cuda.streams import Order
from fusco.engines.cuda.window import TorchAllocator
from fusco.layout.blocks import Ints
from fusco.layout.heap import CHUNK_SPAN, Block, Heap
from fusco.layout.spans import Span
from fusco.topology import Topology
from fusco.transports.bulletin import Bulletin


class NodeMemory(ABC):
    """Where the memory of a node comes from, and when work on it is done.

    Attributes:
        device: where it is.
    """

    device: torch.device

    @abstractmethod
    def allocate(self, num_bytes: int) -> Tensor:
        """This rank's part of a chunk, uint8 `[num_bytes]`; all ranks of the node call it, and it
        may fail on some only, with a RuntimeError."""

    @abstractmethod
    def connect(self, memory: Tensor) -> tuple[Tensor, ...]:
        """Everybody's part in the order of ranks, as tensors of this device, after all have
        allocated theirs."""

    @abstractmethod
    def lend(self, part: Tensor, block: Block, heap: Heap) -> Tensor:
        """The own bytes `part` as a tensor of their own, with which `block` returns to the heap."""

    @abstractmethod
    def make_heap(self) -> Heap:
        """An empty one, for blocks of this memory."""

    @abstractmethod
    def begin(self) -> None:
        """An operation begins, after those before it."""

    @abstractmethod
    def settle(self) -> None:
        """Until all that this rank has asked of the device is done."""


class CudaMemory(NodeMemory):
    """Symmetric memory of torch; of a rank that is alone, ordinary memory of its GPU.

    Args:
        world: what the engine is made for.
        ranks: of the node.
    """

    def __init__(self, world: World, ranks: tuple[int, ...]) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._order = Order(self.device)
        # All ranks of the group number their bulletins, also those that use none.
        bulletin = Bulletin(world.group, world.timeout_s, part=f"node {world.topology.node}")
        self._allocator: TorchAllocator | None = None
        if len(ranks) > 1:
            own = Topology(
                rank=ranks.index(world.topology.rank),
                node_of_rank=(0,) * len(ranks),
                rank_of_expert=(),
            )
            self._allocator = TorchAllocator(bulletin, own, self.device)

    def allocate(self, num_bytes: int) -> Tensor:
        try:
            return self._allocate(num_bytes)
        except RuntimeError:
            torch.cuda.empty_cache()  # what torch keeps for itself is not free for windows
            return self._allocate(num_bytes)

    def _allocate(self, num_bytes: int) -> Tensor:
        if self._allocator is None:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self._allocator.allocate(num_bytes)

    def connect(self, memory: Tensor) -> tuple[Tensor, ...]:
        if self._allocator is None:
            return (memory,)
        return self._allocator.connect(memory).peers

    def lend(self, part: Tensor, block: Block, heap: Heap) -> Tensor:
        span = Span(part.data_ptr(), tuple(part.shape), "|u1", block, heap, part)
        return torch.as_tensor(span, device=self.device)

    def make_heap(self) -> Heap:
        return Heap(uses=self._order)

    def begin(self) -> None:
        self._order.begin()

    def settle(self) -> None:
        # One stream keeps its own order; only others must be told.
        if self._allocator is not None:
            torch.cuda.current_stream(self.device).synchronize()


class NodeHeap:
    """This rank's heap, in chunks that all ranks of the node add together; each rank shares out its
    own part of them.

    Attributes:
        free: what of that is free.
    """

    def __init__(self, memory: NodeMemory, place: int) -> None:
        self._memory = memory
        self._place = place
        self._chunks: list[tuple[Tensor, ...]] = []
        self.free = memory.make_heap()

    @property
    def num_bytes(self) -> int:
        """Size of all chunks."""
        return sum(parts[self._place].numel() for parts in self._chunks)

    def add(self, parts: tuple[Tensor, ...]) -> None:
        """Add a chunk: everybody's part."""
        self.free.add(len(self._chunks) * CHUNK_SPAN, parts[self._place].numel())
        self._chunks.append(parts)

    def parts(self, base: Ints, start: Ints, size: Ints) -> list[Tensor]:
        """A section of every rank's block, uint8.

        Args:
            base: `[ranks]`, where the blocks begin.
            start: `[ranks]`, where the section begins in each, bytes.
            size: `[ranks]`, bytes.
        """
        found = []
        for place, (at, first, count) in enumerate(
            zip(base.tolist(), start.tolist(), size.tolist(), strict=True)
        ):
            chunk, offset = divmod(at + first, CHUNK_SPAN)
            if count:
                found.append(self._chunks[chunk][place][offset : offset + count])
            else:
                found.append(torch.empty(0, dtype=torch.uint8, device=self._memory.device))
        return found

    def lend(self, block: Block, part: Tensor) -> Tensor:
        """The own bytes `part` of a block, which returns to the heap with the tensor."""
        if not part.numel():
            self.free.release(block)
            return part
        return self._memory.lend(part, block, self.free)
