"""Memory that peers can write: symmetric allocations, and the heap that shares them out."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.errors import WindowMemoryError
from fusco.layout.compact import round_up
from fusco.layout.heap import NOTHING, Block, Heap, reserve_largest_of
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
        """Map everybody's part, after all have allocated theirs."""


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

        return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def connect(self, memory: Tensor) -> Allocation:
        from torch._C._distributed_c10d import _SymmetricMemory

        handle = _SymmetricMemory.rendezvous(memory, self._name)
        assert handle is not None, "every rank of the group takes part"
        size = (memory.numel(),)
        # The own part is the memory itself: all mappings end when nothing holds that.
        peers = (
            memory if rank == handle.rank else handle.get_buffer(rank, size, torch.uint8)
            for rank in range(handle.world_size)
        )
        return Allocation(memory=memory, address=tuple(handle.buffer_ptrs), peers=tuple(peers))


class Place(NamedTuple):
    """A block of one chunk of the symmetric heap."""

    chunk: int
    block: Block


NOWHERE = Place(chunk=0, block=NOTHING)


class SymmetricHeap:
    """This rank's heap, in chunks that all ranks add together; each rank shares out its own.

    Blocks that a CUDA graph uses return to `captured`, from where only other captures take them: a
    replay writes them again.
    """

    def __init__(self, num_ranks: int, device: torch.device) -> None:
        self._device = device
        self._chunks: list[tuple[Allocation, Heap]] = []
        self._captured: list[Place] = []
        # One table for good: graphs hold its address. It is read also before there is a chunk, by
        # ranks that receive nothing.
        self.addresses = torch.zeros((_MAX_CHUNKS, num_ranks), dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        """Size of all chunks."""
        return sum(heap.capacity for _, heap in self._chunks)

    def add(self, allocation: Allocation) -> None:
        """Add a chunk that all ranks have allocated."""
        if len(self._chunks) == _MAX_CHUNKS:
            raise WindowMemoryError(
                f"the heap has grown {_MAX_CHUNKS} times, and grows no further; make a new Shuffle "
                "and dispatch the largest load first"
            )
        self.addresses[len(self._chunks)] = torch.tensor(allocation.address, dtype=torch.int64)
        self._chunks.append((allocation, Heap(allocation.memory.numel())))

    def reserve_largest(self) -> Place:
        """The largest free block of all chunks, whole."""
        at, block = reserve_largest_of(heap for _, heap in self._chunks)
        return Place(at, block) if block.size else NOWHERE

    def reserve(self, size: int) -> Place:
        """A block of `size` bytes where there is one, else a smaller one."""
        return self.shrink(self.reserve_largest(), size)

    def reserve_captured(self, size: int) -> Place:
        """A block of `size` bytes that an earlier capture has used, else as `reserve`."""
        for place in self._captured:
            if place.block.size >= size:
                self._captured.remove(place)
                return place
        return self.reserve(size)

    def shrink(self, place: Place, size: int) -> Place:
        """Keep the first `size` bytes, rounded up."""
        if place is NOWHERE:
            return place
        block = self._chunks[place.chunk][1].shrink(place.block, round_up(size))
        return Place(place.chunk, block)

    def release(self, place: Place) -> None:
        """Give a block back."""
        if place is not NOWHERE:
            self._chunks[place.chunk][1].release(place.block)

    def lease_captured(self, place: Place) -> _Lease:
        """Keep a block whole for tensors of a graph, until the last of them is gone."""
        return _Lease(self._captured.append, place)

    def as_tensor(
        self,
        place: Place,
        begin: int,
        end: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        whole: _Lease | None,
    ) -> Tensor:
        """A part of a block as a tensor, with which it returns to the heap.

        Args:
            place: the block.
            begin: where the part begins in the block, bytes.
            end: where it ends.
            shape: of the tensor.
            dtype: of the tensor.
            whole: what the part belongs to, where it does not return by itself.
        """
        if begin == end:
            return torch.empty(shape, dtype=dtype, device=self._device)
        allocation, heap = self._chunks[place.chunk]
        base = place.block.base + begin
        lease = whole or _Lease(heap.release, Block(base, end - begin))
        span = _Span(allocation.base + base, shape, dtype, lease, allocation)
        tensor = torch.as_tensor(span, device=self._device)
        return tensor if tensor.dtype == dtype else tensor.view(dtype)


class _Lease:
    """Gives something back when nobody holds it any more."""

    def __init__(self, release: Callable[[Any], None], what: Any) -> None:
        self._release = release
        self._what = what

    def __del__(self) -> None:
        self._release(self._what)


class _Span:
    """Bytes that a tensor can be made of, which then keeps what they belong to."""

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: torch.dtype, *kept: object
    ) -> None:
        self._kept = kept
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": _TYPES_OF_SIZE[dtype.itemsize] if dtype != torch.float32 else "<f4",
            "shape": shape,
            "data": (address, False),
        }
