"""Memory that the ranks of a node write for each other, and the heap that shares it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusco.engines.base import World
from fusco.engines.cuda.streams import Order
from fusco.engines.cuda.window import TorchAllocator
from fusco.layout.blocks import Ints
from fusco.layout.heap import Block, Heap, reserve_largest_of
from fusco.topology import Topology
from fusco.transports.bulletin import Bulletin

_CHUNK_SPAN = 1 << 40
"""Bytes; where a chunk begins in the addresses of blocks. None is as large."""


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
    def lend(self, part: Tensor, give_back: Callable[[], None]) -> Tensor:
        """Own bytes as a tensor of their own; `give_back` is called when nothing uses it."""

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

    def lend(self, part: Tensor, give_back: Callable[[], None]) -> Tensor:
        return torch.as_tensor(Span(part, give_back), device=self.device)

    def begin(self) -> None:
        self._order.begin()

    def settle(self) -> None:
        # One stream keeps its own order; only others must be told.
        if self._allocator is not None:
            torch.cuda.current_stream(self.device).synchronize()


class Span:
    """Bytes that a tensor or an array can be made of, which then keeps what they belong to."""

    def __init__(self, part: Tensor, give_back: Callable[[], None]) -> None:
        self._part = part
        self._give_back = give_back
        described: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": tuple(part.shape),
            "data": (part.data_ptr(), False),
        }
        if part.is_cuda:
            self.__cuda_array_interface__ = described
        else:
            self.__array_interface__ = described

    def __del__(self) -> None:
        self._give_back()


class NodeHeap:
    """This rank's heap, in chunks that all ranks of the node add together.

    Each rank shares out its own part. A block's base says its chunk too: chunk i begins at
    `i * _CHUNK_SPAN`.
    """

    def __init__(self, memory: NodeMemory, place: int) -> None:
        self._memory = memory
        self._place = place
        self._chunks: list[tuple[tuple[Tensor, ...], Heap]] = []

    @property
    def num_bytes(self) -> int:
        """Size of all chunks."""
        return sum(heap.capacity for _, heap in self._chunks)

    def add(self, parts: tuple[Tensor, ...]) -> None:
        """Add a chunk: everybody's part."""
        self._chunks.append((parts, Heap(parts[self._place].numel())))

    def reserve_largest(self) -> Block:
        """The largest free block of all chunks, whole."""
        at, block = reserve_largest_of(heap for _, heap in self._chunks)
        return Block(base=block.base + at * _CHUNK_SPAN, size=block.size)

    def shrink(self, block: Block, size: int) -> Block:
        """Keep the first `size` bytes, rounded up."""
        if not block.size:
            return block
        chunk, base = divmod(block.base, _CHUNK_SPAN)
        kept = self._chunks[chunk][1].shrink(Block(base=base, size=block.size), size)
        return Block(base=block.base, size=kept.size)

    def release(self, block: Block) -> None:
        """Give a block, or a part of one, back."""
        if block.size:
            chunk, base = divmod(block.base, _CHUNK_SPAN)
            self._chunks[chunk][1].release(Block(base=base, size=block.size))

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
            chunk, offset = divmod(at + first, _CHUNK_SPAN)
            if count:
                found.append(self._chunks[chunk][0][place][offset : offset + count])
            else:
                found.append(torch.empty(0, dtype=torch.uint8, device=self._memory.device))
        return found

    def lend(self, block: Block, part: Tensor) -> Tensor:
        """The own bytes `part` of a block, which returns to the heap with the tensor."""
        if not part.numel():
            self.release(block)
            return part
        return self._memory.lend(part, lambda: self.release(block))
