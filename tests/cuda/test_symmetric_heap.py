"""The heap in symmetric memory, with memory of the CPU: blocks of all chunks, never two alike."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusco.engines.cuda import graphs, window
from fusco.engines.cuda.graphs import CapturedHeaps
from fusco.engines.cuda.window import Allocation, SymmetricHeap
from fusco.layout.compact import BLOCK_ALIGNMENT
from fusco.layout.heap import CHUNK_SPAN, Block, Heap
from fusco.layout.spans import Region, Span

NUM_RANKS = 2
CHUNKS = (4096, 1024, 8192)


def make(chunks: tuple[int, ...]) -> SymmetricHeap:
    heap = SymmetricHeap(NUM_RANKS, torch.device("cpu"))
    for index, size in enumerate(chunks):
        address = tuple(1000 * index + rank for rank in range(NUM_RANKS))
        heap.add(Allocation(memory=torch.empty(size, dtype=torch.uint8), address=address))
    return heap


def extent(block: Block) -> range:
    return range(block.base, block.base + block.size, BLOCK_ALIGNMENT)


def test_without_chunks_there_is_nothing() -> None:
    heap = make(())
    assert heap.num_bytes == 0
    assert heap.free.reserve_largest().size == 0
    assert heap.free.reserve(100).size == 0
    assert not heap.addresses.any()


def test_kernels_find_each_chunk_of_each_rank() -> None:
    heap = make(CHUNKS)
    assert heap.num_bytes == sum(CHUNKS)
    assert heap.addresses[:3].tolist() == [[0, 1], [1000, 1001], [2000, 2001]]


def test_the_largest_block_of_all_chunks_is_reserved_whole() -> None:
    heap = make(CHUNKS)
    blocks = [heap.free.reserve_largest() for _ in range(4)]
    assert [block.size for block in blocks] == [8192, 4096, 1024, 0]
    assert [block.base for block in blocks[:3]] == [2 * CHUNK_SPAN, 0, CHUNK_SPAN]


def test_a_shrunk_block_leaves_the_rest() -> None:
    free = make(CHUNKS).free
    block = free.shrink(free.reserve_largest(), 1)
    assert block.size == BLOCK_ALIGNMENT
    assert free.reserve_largest().size == 8192 - BLOCK_ALIGNMENT


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=40))
def test_blocks_never_overlap(steps: list[tuple[bool, int]]) -> None:
    free = make(CHUNKS).free
    held: list[Block] = []
    taken: set[int] = set()
    for takes, number in steps:
        if takes:
            block = free.reserve(number)
            chunk, start = divmod(block.base, CHUNK_SPAN)
            assert start % BLOCK_ALIGNMENT == 0
            assert start + block.size <= CHUNKS[chunk]
            assert taken.isdisjoint(extent(block))
            taken.update(extent(block))
            held.append(block)
        elif held:
            block = held.pop(number % len(held))
            taken.difference_update(extent(block))
            free.release(block)
    for block in held:
        free.release(block)
    largest = [free.reserve_largest().size for _ in CHUNKS]
    assert sorted(largest) == sorted(CHUNKS)


@pytest.mark.parametrize("chunks", [(), CHUNKS])
def test_a_rehearsal_leaves_the_heap_as_it_was(
    chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Size] = []

    def of_cpu(region: Region, device: torch.device) -> torch.Tensor:
        tensor = torch.from_numpy(np.asarray(region))
        made.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch, "as_tensor", of_cpu)
    heap = make(chunks)
    largest = heap.free.reserve_largest()  # as while a dispatch waits
    heap.rehearse((1, 16), torch.bfloat16)
    assert made == [(1, 16)] * bool(chunks)
    heap.free.release(largest)
    sizes = [heap.free.reserve_largest().size for _ in range(4)]
    assert sizes == [*sorted(chunks, reverse=True), 0, 0, 0, 0][:4]


def test_the_parts_of_a_captured_block_return_for_graphs_of_the_same_pool() -> None:
    heap, home = make((4096,)), Heap(alignment=BLOCK_ALIGNMENT)
    block = heap.reserve(1024, home)
    home.release(Block(block.base, 896))
    assert heap.reserve(1024, home).base == block.base + 1024
    home.release(Block(block.base + 896, 128))
    assert heap.reserve(1024, home) == block
    assert heap.free.reserve_largest().size == 4096 - 2048


def test_graphs_share_a_heap_where_they_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = {1: (0, 1), 2: (0, 2), 3: (0, 1), 4: None, 5: None}
    captured = CapturedHeaps(torch.device("cpu"))
    current = 0

    def capture_on(stream: int) -> int:
        return stream

    monkeypatch.setattr(graphs, "capture_on", capture_on)
    monkeypatch.setattr(graphs, "captured_pool", lambda device: pools[current])
    heaps = []
    for current in pools:
        heaps.append(captured.of(current))
        assert captured.of(current) is heaps[-1]
    assert heaps[0] is heaps[2]
    assert len(set(map(id, heaps))) == 4


def test_the_pool_of_a_capture_is_that_of_what_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = 4096
    segments = [{"address": 4096, "total_size": 1024, "segment_pool_id": (0, 7)}]
    probe = SimpleNamespace(data_ptr=lambda: address)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: probe)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    device = torch.device("cpu")
    assert graphs.captured_pool(device) == (0, 7)
    address += 1024
    assert graphs.captured_pool(device) is None
    segments.append({"address": 5120, "total_size": 1024, "segment_pool_id": (0, 0)})
    assert graphs.captured_pool(device) is None

    def refuse() -> None:
        raise RuntimeError("cudaMallocAsync does not yet support snapshots")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", refuse)
    assert graphs.captured_pool(device) is None


def test_memory_that_goes_in_a_capture_is_freed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    is_capturing = True

    def look() -> bool:
        if is_capturing is None:
            raise RuntimeError("the device is broken")
        return is_capturing

    def of_cpu(region: Region, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(np.asarray(region))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", look)
    monkeypatch.setattr(torch, "as_tensor", of_cpu)
    memory = [torch.empty(64, dtype=torch.uint8) for _ in range(3)]
    refs = [weakref.ref(each) for each in memory]
    leased = [window._lease(each)[1:] for each in memory]
    del memory
    leased.pop()
    is_capturing = None
    leased.pop()
    assert all(ref() is not None for ref in refs)
    is_capturing = False
    leased.pop()
    assert all(ref() is None for ref in refs)


def test_a_block_is_kept_by_the_arrays_over_it() -> None:
    heap = make((4096,))
    block = heap.free.reserve(1024)
    memory = np.arange(1024, dtype=np.uint8)
    is_kept, want = weakref.ref(memory), memory[128:].tobytes()
    array = np.asarray(Span(memory.ctypes.data, (8, 32), "<i4", block, heap.free, memory))
    part = array[1:]
    del array, memory
    assert is_kept() is not None
    assert part.tobytes() == want
    assert heap.free.reserve_largest().size == 4096 - 1024
    del part
    assert is_kept() is None
    assert heap.free.reserve_largest() == block
