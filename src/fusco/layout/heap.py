"""A first-come allocator over one window: offsets only, it never touches memory."""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

ALIGNMENT = 64
"""Bytes; a cache line, and enough for any vector store."""


def align(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Block(NamedTuple):
    """A reserved range of a window, bytes."""

    base: int
    size: int


NOTHING = Block(base=0, size=0)
"""The block of an operation that brings a rank nothing."""


class Heap:
    """Free ranges of a window of `capacity` bytes.

    A block is reserved before it is known how much of it is needed: the largest free range. Then
    it shrinks. `release` may be called from any thread and from finalizers.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self._free = [Block(base=0, size=capacity)] if capacity else []
        # Finalizers run at any point, also inside this class, so they only append here.
        self._released: deque[Block] = deque()

    def reserve_largest(self) -> Block:
        """Take the largest free range whole; an empty block where nothing is free."""
        largest = self.largest()
        if largest.size:
            self.take(largest)
        return largest

    def largest(self) -> Block:
        """The largest free range; an empty block where nothing is free."""
        self._collect()
        free = self._free
        if len(free) == 1:
            return free[0]
        return max(free, key=_size) if free else NOTHING

    def take(self, block: Block) -> None:
        """Take a free range whole."""
        self._free.remove(block)

    def capacity_for(self, size: int) -> int:
        """The capacity at which a block of `size` bytes would be free at the end."""
        self._collect()
        tail = self._free[-1] if self._free else NOTHING
        free_at_end = tail.size if tail.base + tail.size == self.capacity else 0
        return max(self.capacity, self.capacity - free_at_end + align(size))

    def extend(self, capacity: int) -> None:
        """Tell that the window has grown to `capacity` bytes."""
        if capacity > self.capacity:
            added = Block(base=self.capacity, size=capacity - self.capacity)
            self.capacity = capacity
            self._insert(added)

    def shrink(self, block: Block, size: int) -> Block:
        """Keep the first `size` bytes of a block, rounded up; the rest is free again."""
        kept = min(align(size), block.size)
        self._insert(Block(block.base + kept, block.size - kept))
        return Block(block.base, kept)

    def release(self, block: Block) -> None:
        """Give a block, or a part of one, back."""
        self._released.append(block)

    def _collect(self) -> None:
        while self._released:
            self._insert(self._released.popleft())

    def _insert(self, block: Block) -> None:
        """Add a range to the free ones, which are in order and never touch each other."""
        base, size = block
        if not size:
            return
        free = self._free
        at = bisect(free, block)
        if at < len(free) and base + size == free[at].base:
            size += free.pop(at).size
        if at:
            before = free[at - 1]
            if before.base + before.size == base:
                free[at - 1] = Block(before.base, before.size + size)
                return
        free.insert(at, Block(base, size))


def reserve_largest_of(heaps: Iterable[Heap]) -> tuple[int, Block]:
    """Take the largest free range of several heaps whole: the number of its heap, and the range; an
    empty block where nothing is free."""
    largest, at, holder = NOTHING, 0, None
    for number, heap in enumerate(heaps):
        block = heap.largest()
        if block.size > largest.size:
            largest, at, holder = block, number, heap
    if holder is not None:
        holder.take(largest)
    return at, largest


_size = attrgetter("size")
