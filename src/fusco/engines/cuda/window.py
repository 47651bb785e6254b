"""Memory that peers can write: symmetric allocations, and the heap that shares them out."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.layout.compact import BLOCK_ALIGNMENT, round_up
from fusco.layout.heap import Block, Heap

_CHUNK_UNIT = 2 << 20
_GROWTH = 1.25


@dataclass(frozen=True, kw_only=True, eq=False)
class Allocation:
    """Equal amounts of memory on every rank.

    Attributes:
        memory: uint8 `[bytes]`, this rank's.
        address: by rank, where each rank's memory is mapped here.
    """

    memory: Tensor
    address: tuple[int, ...]


class Allocator(ABC):
    """Where symmetric memory comes from. Both methods are collective."""

    @abstractmethod
    def allocate(self, num_bytes: int) -> Tensor:
        """This rank's part, uint8 `[num_bytes]`; it may fail on some ranks only."""

    @abstractmethod
    def connect(self, memory: Tensor) -> Allocation:
        """Map everybody's part, after all have allocated theirs."""


class TorchAllocator(Allocator):
    """torch symmetric memory."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device

    def allocate(self, num_bytes: int) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric_memory

        return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def connect(self, memory: Tensor) -> Allocation:
        import torch.distributed._symmetric_memory as symmetric_memory

        handle = symmetric_memory.rendezvous(memory, self._group)
        assert handle is not None, "every rank of the group takes part"
        return Allocation(memory=memory, address=tuple(handle.buffer_ptrs))


@dataclass(frozen=True, kw_only=True)
class Place:
    """A block of one chunk of the symmetric heap."""

    chunk: int
    block: Block


class SymmetricHeap:
    """This rank's heap, in chunks that all ranks add together; each rank shares out its own."""

    def __init__(self, num_ranks: int, device: torch.device) -> None:
        self._device = device
        self._num_ranks = num_ranks
        self._chunks: list[tuple[Allocation, Heap]] = []
        self._outstanding: set[weakref.finalize[Any, Any]] = set()
        # Read also before there is a chunk, by ranks that receive nothing.
        self.addresses = torch.zeros(num_ranks, dtype=torch.int64, device=device)
        self.nothing = Place(chunk=0, block=Block(base=0, size=0))

    @property
    def num_bytes(self) -> int:
        """Size of all chunks."""
        return sum(heap.capacity for _, heap in self._chunks)

    def add(self, allocation: Allocation) -> None:
        """Add a chunk that all ranks have allocated."""
        self._chunks.append((allocation, Heap(allocation.memory.numel())))
        table = [allocation.address for allocation, _ in self._chunks]
        self.addresses = torch.tensor(table, dtype=torch.int64, device=self._device)

    @staticmethod
    def chunk_bytes(need: int) -> int:
        """How large a chunk should be in which `need` bytes must fit."""
        return round_up(int(need * _GROWTH), _CHUNK_UNIT)

    def reserve_largest(self) -> Place:
        """The largest free block of all chunks, whole."""
        if not self._chunks:
            return self.nothing
        places = [
            Place(chunk=i, block=heap.reserve_largest()) for i, (_, heap) in enumerate(self._chunks)
        ]
        largest = max(places, key=lambda place: place.block.size)
        for place in places:
            if place is not largest:
                self.release(place)
        return largest

    def reserve(self, size: int) -> Place:
        """A block of at least `size` bytes where there is one, else the largest there is."""
        return self.shrink(self.reserve_largest(), size)

    def shrink(self, place: Place, size: int) -> Place:
        """Keep the first `size` bytes, rounded up."""
        if place is self.nothing:
            return place
        block = self._chunks[place.chunk][1].shrink(place.block, round_up(size))
        return Place(chunk=place.chunk, block=block)

    def release(self, place: Place) -> None:
        """Give a block back."""
        if place is not self.nothing:
            self._chunks[place.chunk][1].release(place.block)

    def as_tensors(
        self, place: Place, sizes: list[tuple[int, tuple[int, ...], torch.dtype]]
    ) -> list[Tensor]:
        """Parts of a block as tensors; each part returns to the heap with its tensor.

        Args:
            place: the block.
            sizes: for each part its offset in the block, its shape and dtype; in order.
        """
        if place is self.nothing:
            return [
                torch.empty(shape, dtype=dtype, device=self._device) for _, shape, dtype in sizes
            ]
        allocation, heap = self._chunks[place.chunk]
        ends = [offset for offset, _, _ in sizes[1:]] + [place.block.size]
        return [
            self._as_tensor(allocation, heap, place.block, offset, end, shape, dtype)
            for (offset, shape, dtype), end in zip(sizes, ends, strict=True)
        ]

    def _as_tensor(
        self,
        allocation: Allocation,
        heap: Heap,
        block: Block,
        offset: int,
        end: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        part = Block(base=block.base + offset, size=end - offset)
        num_elements = 1
        for size in shape:
            num_elements *= size
        if num_elements == 0:
            heap.release(part)
            return torch.empty(shape, dtype=dtype, device=self._device)
        address = allocation.memory.data_ptr() + part.base
        span = _Span(allocation, address, num_elements * dtype.itemsize)
        weakref.finalize(span, heap.release, part).atexit = False
        return torch.as_tensor(span, device=self._device).view(dtype).view(shape)


class _Span:
    """Bytes of an allocation, kept alive by whoever keeps a tensor of them."""

    def __init__(self, allocation: Allocation, address: int, num_bytes: int) -> None:
        self._allocation = allocation
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "data": (address, False),
        }


assert BLOCK_ALIGNMENT % 64 == 0, "the heap rounds to 64 bytes"
