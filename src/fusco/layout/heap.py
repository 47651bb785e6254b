"""A first-come allocator over memory told of in ranges: offsets only, it never touches memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import NamedTuple

ALIGNMENT = 64
"""Bytes; a cache line, and enough for any vector store."""
CHUNK_SPAN = 1 << 40
"""Bytes; where memory comes in chunks, chunk i begins at i times this. None is as large."""


def align(size: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of `alignment`."""
    return -(-size // alignment) * alignment


class Block(NamedTuple):
    """A reserved range, bytes."""

    base: int
    size: int


NOTHING = Block(base=0, size=0)
"""The block of an operation that brings a rank nothing."""


class Uses(ABC):
    """What is still to be done with memory when it is released, such as the work of a stream."""

    @abstractmethod
    def note_use(self) -> None:
        """Memory is about to be released; on any thread, and in finalizers."""

    @abstractmethod
    def await_uses(self) -> None:
        """Let who has reserved memory use it only after all that was noted."""


class Heap:
    """Free ranges of memory of `capacity` bytes, or of chunks with gaps in between.

    A block is reserved before it is known how much of it is needed: the largest free range. Then
    it shrinks. `release` may be called from any thread and from finalizers.

    Args:
        capacity: bytes that are free from the beginning.
        alignment: of blocks, bytes.
        uses: of the memory, beyond its release; None: there are none.
    """

    def __init__(
        self, capacity: int = 0, alignment: int = ALIGNMENT, uses: Uses | None = None
    ) -> None:
        self._alignment = alignment
        self._uses = uses
        # Where each free range ends, by where it begins, and the reverse; none touch each other.
        self._end_of: dict[int, int] = {}
        self._begin_of: dict[int, int] = {}
        # Finalizers run at any point, also inside this class, so they only append here.
        self._released: deque[Block] = deque()
        self.add(0, capacity)

    def add(self, base: int, size: int) -> None:
        """Tell of more memory, behind all that there is."""
        self.capacity = base + size
        self._insert(base, size)

    def reserve_largest(self) -> Block:
        """Take the largest free range whole; an empty block where nothing is free."""
        self._collect()
        if not self._end_of:
            return NOTHING
        begin, end = max(self._end_of.items(), key=_size)
        del self._end_of[begin], self._begin_of[end]
        if self._uses is not None:
            self._uses.await_uses()
        return Block(begin, end - begin)

    def reserve(self, size: int) -> Block:
        """A block of `size` bytes where there is one, else a smaller one."""
        return self.shrink(self.reserve_largest(), size)

    def capacity_for(self, size: int) -> int:
        """The capacity at which a block of `size` bytes would be free at the end."""
        self._collect()
        tail = self._begin_of.get(self.capacity, self.capacity)
        return max(self.capacity, tail + align(size, self._alignment))

    def shrink(self, block: Block, size: int) -> Block:
        """Keep the first `size` bytes of a block, rounded up; the rest is free again."""
        base, whole = block
        kept = min(align(size, self._alignment), whole)
        self._insert(base + kept, whole - kept)
        return Block(base, kept)

    def release(self, block: Block) -> None:
        """Give a block, or a part of one, back."""
        if self._uses is not None:
            self._uses.note_use()
        self._released.append(block)

    def _collect(self) -> None:
        while self._released:
            self._insert(*self._released.popleft())

    def _insert(self, base: int, size: int) -> None:
        if size:
            begin = self._begin_of.pop(base, base)
            end = self._end_of.pop(base + size, base + size)
            self._end_of[begin], self._begin_of[end] = end, begin


def _size(free: tuple[int, int]) -> int:
    begin, end = free
    return end - begin
