"""Windows: anonymous shared memory (memfd) of one rank, mapped by all."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusco.layout.heap import Block, Heap, align
from fusco.layout.spans import Span

_GROWTH = 1.25


class Mapping:
    """One shared memory file, mapped whole. It has no name: when the last process that has it
    open or mapped ends, however it ends, the memory is gone.
    """

    def __init__(self, file: int, size: int) -> None:
        self.file = file
        self.size = size
        self._map = mmap.mmap(file, size)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)

    @classmethod
    def create(cls, name: str, size: int) -> Mapping:
        """A new file of zeros."""
        file = os.memfd_create(name)
        os.posix_fallocate(file, 0, size)
        return cls(file, size)

    @classmethod
    def open(cls, process: int, file: int) -> Mapping:
        """The file that another process has open."""
        opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
        return cls(opened, os.fstat(opened).st_size)

    def remapped(self) -> Mapping:
        """The same file at its present size. What still uses the old mapping keeps it alive."""
        return Mapping(self.file, os.fstat(self.file).st_size)


class Window:
    """This rank's window: what peers write into, and the heap that shares it out."""

    def __init__(self, initial_bytes: int) -> None:
        self.mapping = Mapping.create("fusco-window", align(initial_bytes))
        self.heap = Heap(self.mapping.size)
        # Tensors may still lie in a mapping from before the window grew, which they keep alive.
        self._mappings = weakref.WeakSet([self.mapping])

    def reserve(self, size: int) -> Block:
        """A block of at least `size` bytes; the window grows if it must.

        Raises:
            MemoryError: the system has not so much memory.
        """
        block = self.heap.reserve_largest()
        if block.size < size:
            self.heap.release(block)
            self._grow(self.heap.capacity_for(size))
            block = self.heap.reserve_largest()
        return self.heap.shrink(block, size)

    def reserve_largest(self) -> Block:
        """The largest free block whole, for a need that is not known yet."""
        return self.heap.reserve_largest()

    def _grow(self, capacity: int) -> None:
        old = self.mapping
        capacity = align(max(capacity, int(old.size * _GROWTH)))
        try:
            # Allocated now, so that a lack of memory is an error here and not a signal later.
            os.posix_fallocate(old.file, old.size, capacity - old.size)
            self.mapping = old.remapped()
        except OSError as error:
            raise MemoryError(
                f"the window cannot grow from {old.size} to {capacity} bytes: {error.strerror}"
            ) from error
        self._mappings.add(self.mapping)
        self.heap.add(old.size, capacity - old.size)

    def address_of(self, block: Block) -> int:
        """Where a block is mapped in this process."""
        return self.mapping.address + block.base

    def as_tensor(self, block: Block, num_bytes: int) -> Tensor:
        """uint8 `[num_bytes]` at the head of a block, which returns to the heap with the tensor."""
        at = self.address_of(block)
        span = Span(at, (num_bytes,), "|u1", block, self.heap, self.mapping)
        return torch.from_numpy(np.asarray(span))

    def find(self, tensor: Tensor) -> int:
        """Where in the window a tensor begins, bytes; -1 if it does not lie there."""
        address = tensor.data_ptr()
        if self.mapping.address <= address < self.mapping.address + self.mapping.size:
            return address - self.mapping.address
        for mapping in self._mappings:
            if mapping.address <= address < mapping.address + mapping.size:
                return address - mapping.address
        return -1

    def view(self, block: Block, offset: int, count: int, dtype: Any) -> npt.NDArray[Any]:
        """`count` elements of a block from byte `offset` on; not to outlive the block."""
        begin = block.base + offset
        size = count * np.dtype(dtype).itemsize
        return self.mapping.bytes[begin : begin + size].view(dtype)

    def close(self) -> None:
        """Close the file; mapped memory stays for the tensors that use it."""
        os.close(self.mapping.file)
