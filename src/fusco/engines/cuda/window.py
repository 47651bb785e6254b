"""Memory that peers can write: symmetric allocations, and the heap that shares them out."""

from __future__ import annotations

import functools
import weakref
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.engines.cuda.graphs import CapturedHeaps
from fusco.errors import WindowMemoryError
from fusco.layout.compact import BLOCK_ALIGNMENT
from fusco.layout.heap import CHUNK_SPAN, NOTHING, Block, Heap, Uses
from fusco.layout.spans import Region, Span
from fusco.topology import Topology
from fusco.transports.bulletin import Bulletin
from fusco.transports.renumbered import RenumberedStore

# The interface knows neither bfloat16 nor fp8: such tensors are views of integers.
_TYPES_OF_SIZE = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8", 16: "<c16"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Allocation:
    """Equal amounts of memory on every rank.

    Attributes:
        memory: uint8 `[bytes]`, this rank's.
        address: by rank, where each rank's memory is mapped here.
        peers: by rank, each rank's memory as a tensor of this rank's device, where it is known.
        base: where this rank's own is.
    """

    memory: Tensor
    address: tuple[int, ...]
    peers: tuple[Tensor, ...] = ()

    @functools.cached_property
    def base(self) -> int:
        return self.memory.data_ptr()


_MAX_CHUNKS = 1024


class Allocator(ABC):
    """Where symmetric memory comes from. Both methods are collective."""

    @abstractmethod
    def allocate(self, num_bytes: int) -> Tensor:
        """This rank's part, uint8 `[num_bytes]`; it may fail on some ranks only."""

    @abstractmethod
    def connect(self, memory: Tensor) -> Allocation:
        """Map everybody's part, after all have allocated theirs; it may fail on some ranks only."""


class TorchAllocator(Allocator):
    """torch symmetric memory.

    Args:
        bulletin: of the ranks.
        topology: of the ranks.
        device: where to allocate.
    """

    def __init__(self, bulletin: Bulletin, topology: Topology, device: torch.device) -> None:
        from torch._C._distributed_c10d import PrefixStore, _register_process_group

        self._device = device
        # Names of groups are unique in a process, and so is a bulletin's in its group.
        self._name = cast(Any, f"{bulletin.name} of {bulletin.group_name}")
        self._store = RenumberedStore(
            PrefixStore(f"{bulletin.name}/memory", bulletin.store),
            # Half, for a rank that cannot map others' memory waits for theirs to say so.
            bulletin.timeout_s / 2,
        )
        # No communicator, only the ranks and their store under a name, which is all that torch
        # looks for.
        self._group = dist.ProcessGroup(self._store, topology.rank, topology.num_ranks)
        _register_process_group(self._name, self._group)

    def allocate(self, num_bytes: int) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric_memory

        _let_go()
        memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return _lease(memory)

    def connect(self, memory: Tensor) -> Allocation:
        from torch._C._distributed_c10d import _SymmetricMemory

        self._store.begin_round()
        handle = _SymmetricMemory.rendezvous(memory, self._name)
        assert handle is not None, "every rank of the group takes part"
        size = (memory.numel(),)
        # All mappings end when nothing holds the own part.
        peers = (
            memory if rank == handle.rank else handle.get_buffer(rank, size, torch.uint8)
            for rank in range(handle.world_size)
        )
        return Allocation(memory=memory, address=tuple(handle.buffer_ptrs), peers=tuple(peers))


waiting: list[Tensor] = []
"""Symmetric memory to free as soon as that does no harm."""


def _lease(memory: Tensor) -> Tensor:
    """The same memory as a tensor, with whose last view it is let go."""
    region = Region(memory.data_ptr(), tuple(memory.shape), "|u1")
    weakref.finalize(region, _let_go, memory).atexit = False
    return torch.as_tensor(region, device=memory.device)


def _let_go(*memory: Tensor) -> None:
    """Free symmetric memory, and what waits. torch ends a process that does it while a graph is
    captured, or with a device that is broken; what the current stream shows of that is heeded."""
    waiting.extend(memory)
    with suppress(RuntimeError):  # of a broken device
        if not torch.cuda.is_current_stream_capturing():
            waiting.clear()


class SymmetricHeap:
    """This rank's heap, in chunks that all ranks add together; each rank shares out its own.

    Args:
        num_ranks: how many.
        device: of the memory.
        uses: what may still use memory that is free.

    Attributes:
        free: what of the chunks is free.
        captured: what of them belongs to CUDA graphs, and no tensor uses any more.
        addresses: int64 `[most chunks, P]`, where each rank's are mapped here.
    """

    def __init__(self, num_ranks: int, device: torch.device, uses: Uses | None = None) -> None:
        self._device = device
        self.chunks: list[Allocation] = []
        self.free = Heap(alignment=BLOCK_ALIGNMENT, uses=uses)
        self.captured = CapturedHeaps(device)
        # One table for good: graphs hold its address. It is read also before there is a chunk, by
        # ranks that receive nothing.
        self.addresses = torch.zeros((_MAX_CHUNKS, num_ranks), dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        """Size of all chunks."""
        return sum(chunk.memory.numel() for chunk in self.chunks)

    def add(self, allocation: Allocation) -> None:
        """Add a chunk that all ranks have allocated."""
        number = len(self.chunks)
        if number == _MAX_CHUNKS:
            raise WindowMemoryError(
                f"the heap has grown {_MAX_CHUNKS} times, and grows no further; make a new Shuffle "
                "and dispatch the largest load first"
            )
        address = torch.tensor(allocation.address, dtype=torch.int64, device="cpu")
        self.addresses[number] = address
        self.chunks.append(allocation)
        self.free.add(number * CHUNK_SPAN, allocation.memory.numel())

    def reserve(self, size: int, home: Heap) -> Block:
        """A block of `size` bytes of the heap `home` or else of what is free; where there is none,
        a smaller one that is free."""
        block = home.reserve(size)
        if block.size < size and home is not self.free:
            home.release(block)
            block = self.free.reserve(size)
        return block

    def as_tensor(
        self, block: Block, shape: tuple[int, ...], dtype: torch.dtype, home: Heap
    ) -> Tensor:
        """A block, or a part of one, as a tensor, with which it returns to the heap `home`."""
        if not block.size:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return self._over(block, shape, dtype, home)

    def rehearse(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Do what `as_tensor` does, to no end but that its code is in the processor's caches: where
        other code has filled them, the first tensor takes four times as long as the next."""
        if self.chunks:
            self._over(NOTHING, shape, dtype, self.free)

    def _over(self, block: Block, shape: tuple[int, ...], dtype: torch.dtype, home: Heap) -> Tensor:
        number, start = divmod(block.base, CHUNK_SPAN)
        chunk = self.chunks[number]
        kind = _TYPES_OF_SIZE[dtype.itemsize] if dtype != torch.float32 else "<f4"
        span = Span(chunk.base + start, shape, kind, block, home, chunk)
        tensor = torch.as_tensor(span, device=self._device)
        return tensor if tensor.dtype == dtype else tensor.view(dtype)
