"""The heap in symmetric memory, with memory of the CPU: blocks of all chunks, never two alike."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusco.engines.cuda.window import Allocation, Place, SymmetricHeap
from fusco.layout.compact import BLOCK_ALIGNMENT

NUM_RANKS = 2
CHUNKS = (4096, 1024, 8192)


def make(chunks: tuple[int, ...]) -> SymmetricHeap:
    heap = SymmetricHeap(NUM_RANKS, torch.device("cpu"))
    for index, size in enumerate(chunks):
        address = tuple(1000 * index + rank for rank in range(NUM_RANKS))
        heap.add(Allocation(memory=torch.empty(size, dtype=torch.uint8), address=address))
    return heap


def extent(place: Place) -> range:
    return range(place.block.base, place.block.base + place.block.size)


def test_without_chunks_there_is_nothing() -> None:
    heap = make(())
    assert heap.num_bytes == 0
    assert heap.reserve_largest().block.size == 0
    assert heap.reserve(100).block.size == 0
    assert not heap.addresses.any()


def test_kernels_find_each_chunk_of_each_rank() -> None:
    heap = make(CHUNKS)
    assert heap.num_bytes == sum(CHUNKS)
    assert heap.addresses[:3].tolist() == [[0, 1], [1000, 1001], [2000, 2001]]


def test_the_largest_block_of_all_chunks_is_reserved_whole() -> None:
    heap = make(CHUNKS)
    sizes = [heap.reserve_largest() for _ in range(4)]
    assert [place.block.size for place in sizes] == [8192, 4096, 1024, 0]
    assert [place.chunk for place in sizes[:3]] == [2, 0, 1]


def test_a_shrunk_block_leaves_the_rest() -> None:
    heap = make(CHUNKS)
    place = heap.shrink(heap.reserve_largest(), 1)
    assert place.block.size == BLOCK_ALIGNMENT
    assert heap.reserve_largest().block.size == 8192 - BLOCK_ALIGNMENT


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=40))
def test_blocks_never_overlap(steps: list[tuple[bool, int]]) -> None:
    heap = make(CHUNKS)
    held: list[Place] = []
    for takes, number in steps:
        if takes:
            place = heap.reserve(number)
            assert place.block.base % BLOCK_ALIGNMENT == 0
            assert place.block.base + place.block.size <= CHUNKS[place.chunk]
            for other in held:
                if other.chunk == place.chunk:
                    taken = extent(other)
                    assert not any(at in taken for at in extent(place)[::BLOCK_ALIGNMENT])
            held.append(place)
        elif held:
            heap.release(held.pop(number % len(held)))
    for place in held:
        heap.release(place)
    largest = [heap.reserve_largest().block.size for _ in CHUNKS]
    assert sorted(largest) == sorted(CHUNKS)
