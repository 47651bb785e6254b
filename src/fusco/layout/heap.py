"""A first-come allocator over one window: offsets only, it never touches memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes; a cache line, and enough for any vector store."""


def align(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Block:
    """A reserved range of a window, bytes."""

    base: int
    size: int


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
        self._collect()
        if not self._free:
            return Block(base=0, size=0)
        largest = max(self._free, key=lambda block: block.size)
        self._free.remove(largest)
        return largest

    def capacity_for(self, size: int) -> int:
        """The capacity at which a block of `size` bytes would be free at the end."""
        self._collect()
        tail = self._free[-1] if self._free else Block(base=0, size=0)
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
        self._insert(Block(base=block.base + kept, size=block.size - kept))
        return Block(base=block.base, size=kept)

    def release(self, block: Block) -> None:
        """Give a block, or a part of one, back."""
        self._released.append(block)

    def _collect(self) -> None:
        while self._released:
            self._insert(self._released.popleft())

    def _insert(self, block: Block) -> None:
        if not block.size:
            return
        self._free.append(block)
        self._free.sort(key=lambda each: each.base)
        merged: list[Block] = []
        for each in self._free:
            if merged and merged[-1].base + merged[-1].size == each.base:
                merged[-1] = Block(base=merged[-1].base, size=merged[-1].size + each.size)
            else:
                merged.append(each)
        self._free = merged
