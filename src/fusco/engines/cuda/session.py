"""One rank's place among the GPUs of its node: windows, kernels, and what they report."""

from __future__ import annotations

import ctypes
import functools
import struct
import weakref
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from typing import NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from fusco.engines.agreement import Call, Made, make_on_all
from fusco.engines.base import World
from fusco.engines.cuda.failures import Failures
from fusco.engines.cuda.jit import Variant, element_of
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.launch import Launcher
from fusco.engines.cuda.streams import Order
from fusco.engines.cuda.window import Allocation, SymmetricHeap, TorchAllocator
from fusco.errors import EngineUnavailableError, PeerError, WindowMemoryError, input_error
from fusco.layout.compact import WindowLayout, chunk_bytes
from fusco.layout.heap import CHUNK_SPAN, NOTHING, Block
from fusco.layout.records import HEADER
from fusco.transports.bulletin import Bulletin

MAX_PLAN_BLOCKS = 128
_SAY_THREADS = 128
_SPINS = 1000
"""Looks at a report before looking for what may keep it, which takes far longer."""
_STATIC_SHARED_BYTES = 1024
"""More than any kernel declares beside what it is launched with."""
_PENDING = structs.State.pending.offset // 4
_NUM_ROWS = structs.State.num_rows.offset // 4
_CALL = struct.Struct(f"{len(structs.Call._fields_)}q")


class Counted(NamedTuple):
    """What kernels count for `Stats`, under the same names."""

    num_rows: int
    bytes_to_peer: tuple[int, ...]
    wait_s: tuple[float, ...]


class Report(NamedTuple):
    """What a kernel reports; see `structs.Report`."""

    ticket: int
    verdict: int
    num_rows: int
    need: int


_SHARING: weakref.WeakSet[Session] = weakref.WeakSet()
"""Sessions of this process whose kernels may run beside each other."""


class Session:
    """What all operations of one Shuffle share. The stream they are made on orders them."""

    def __init__(self, world: World) -> None:
        topology = world.topology
        self.world = world
        self.rank, self.num_ranks = topology.rank, topology.num_ranks
        self.device_index = torch.cuda.current_device()
        self.device = torch.device("cuda", self.device_index)
        properties = torch.cuda.get_device_properties(self.device)
        self.max_sms: int = properties.multi_processor_count
        self.num_sms = min(world.num_sms or self.max_sms, self.max_sms)
        optin: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        self.max_shared_bytes = optin - _STATIC_SHARED_BYTES
        self.max_tokens = world.max_tokens
        self.layout = WindowLayout(
            num_ranks=self.num_ranks,
            num_experts=topology.num_experts,
            max_tokens=world.max_tokens,
            top_k=world.top_k,
            row_bytes=world.row_bytes,
            max_parts=structs.MAX_PARTS,
        )
        self.bulletin = Bulletin(world.group, world.timeout_s)
        self._allocator = TorchAllocator(self.bulletin, topology, self.device)
        self.order = Order(self.device)
        self.heap = SymmetricHeap(self.num_ranks, self.device, self.order)
        self.window = self._allocate_everywhere("Shuffle", "windows", self.layout.offsets()["end"])
        self.call = structs.Call()
        self._num_growths = 0
        # No rank's kernels may write before every window is clear.
        self.make_ready("tables", self._make_tables, "free memory")

    def make_ready(self, topic: str, make: Callable[[], Made], remedy: str) -> Made:
        """What a rank needs before any may begin, or an error on every rank."""
        timeout_s = self.world.making_timeout_s
        made, problems = make_on_all(make, lambda text: self.bulletin.swap(topic, text, timeout_s))
        if problems:
            raise EngineUnavailableError(
                f"Shuffle: engine 'cuda' has no {topic} on all ranks ({problems}); {remedy}, or "
                "use engine='reference'"
            )
        return cast(Made, made)

    def _make_tables(self) -> None:
        self.window.memory.zero_()
        torch.cuda.current_stream().synchronize()
        topology, device = self.world.topology, self.device
        facts = topology.tensors("cpu")
        num_counts = topology.num_experts + self.num_ranks

        def ints(values: Tensor) -> Tensor:
            return values.to(torch.int32).to(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._tables = {
            "windows": torch.tensor(self.window.address, dtype=torch.int64, device=device),
            "state": zeros(ctypes.sizeof(structs.State), dtype=torch.uint8),
            "rank_of_expert": ints(facts.rank_of_expert),
            "device_major": ints(facts.device_major),
            "first_place": ints(facts.first_expert),
            "rank_order": ints(facts.rank_of_order[:-1]),
            "node_of_rank": ints(facts.node_of_rank),
            "slot_base": zeros(topology.num_experts),
            "totals": zeros(num_counts),
            "counted": zeros(MAX_PLAN_BLOCKS * num_counts),
            "wait_ns": zeros(self.num_ranks, dtype=torch.int64),
            "sent_bytes": zeros(self.num_ranks, dtype=torch.int64),
        }
        failure_len = ctypes.sizeof(structs.Failure) // 8
        report_len = ctypes.sizeof(structs.Report) // 8
        pinned = torch.zeros(
            failure_len + structs.REPORTS * report_len, dtype=torch.int64, pin_memory=True
        )
        self._pinned = pinned
        self._failure = pinned.numpy()[:failure_len]
        reports = pinned.numpy()[failure_len:].reshape(structs.REPORTS, report_len)
        self._reports_at = reports.ctypes.data
        self._reports = [each.data for each in reports]  # read faster than numpy's
        self.one = torch.zeros(1, dtype=torch.uint8, device=device)
        self.constants = self._constants(self.layout.offsets())
        pending = self._tables["state"].view(torch.int32)[_PENDING : _PENDING + 1]
        self.failures = Failures(self.world, self.bulletin, self._failure, pending, self._head_of)

    def _constants(self, offsets: dict[str, int]) -> structs.World:
        topology = self.world.topology
        known = {
            **{name: table.data_ptr() for name, table in self._tables.items()},
            **{name: at for name, at in offsets.items() if name != "end"},
            "heaps": self.heap.addresses.data_ptr(),
            "failure": self._failure.ctypes.data,
            "reports": self._reports_at,
            "timeout_ns": int(self.world.timeout_s * 1e9),
            "record_bytes": self.layout.record_bytes,
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "num_experts": topology.num_experts,
            "num_local": topology.num_local_experts[self.rank],
            "top_k": self.world.top_k,
            "max_tokens": self.max_tokens,
            "alignment": self.world.alignment,
            "num_returns": self.layout.num_returns,
            "static_rows": self.world.max_recv_tokens or 0,
        }
        return structs.World(**known)

    def load_kernels(self) -> None:
        """Load those that are no operation's own."""
        self._say = self.launcher(Variant(name="agree"))

    def launcher(self, variant: Variant, *arguments: ctypes.Structure) -> Launcher:
        """A kernel that takes the constants, the call, and `arguments`."""
        return Launcher(
            variant,
            self.device.index,
            (self.constants, self.call, *arguments),
            self.max_shared_bytes,
        )

    def launchers(self, name: str, argument: ctypes.Structure) -> Callable[[torch.dtype], Launcher]:
        """One `launcher` for each type of element, loaded when it is first asked for."""

        @functools.cache
        def launcher_of(dtype: torch.dtype) -> Launcher:
            return self.launcher(Variant(name=name, element=element_of(dtype)), argument)

        return launcher_of

    def describe(self, call: Call, block: Block) -> int:
        """Fill this rank's record of an operation; the ticket by which it will be reported."""
        self.failures.raise_lost()
        ticket: int = self.call.ticket + 1
        chunk, base = divmod(block.base, CHUNK_SPAN)
        _, *head = call.head(0, base, block.size)
        # All fields at once, since ctypes takes its time for each.
        _CALL.pack_into(self.call, 0, *head, chunk, ticket)
        self.failures.remember(ticket, call)
        return ticket

    def _head_of(self, epoch: int, rank: int) -> list[int]:
        """What `rank` has published in this rank's window; see `Failures`."""
        index = (epoch & 1) * self.num_ranks + rank
        at = self.constants.records_at + index * self.constants.record_bytes
        head: list[int] = self.window.memory[at : at + 8 * HEADER].view(torch.int64).tolist()
        return head

    def has_reported(self, ticket: int) -> bool:
        """Whether a dispatch has reported already."""
        return self._reports[ticket % structs.REPORTS][0] == ticket

    def await_report(self, ticket: int) -> Report:
        """What a dispatch reports."""
        report = self._reports[ticket % structs.REPORTS]
        spins = 0
        event = None
        # NOTE: bounded, since every wait in a kernel is; what is queued before it is the caller's.
        while report[0] != ticket:
            spins += 1
            if spins % _SPINS:
                continue
            if event is None:
                event = torch.cuda.Event()
                event.record()
            self.failures.raise_lost()
            if event.query() and report[0] != ticket:
                self.failures.raise_lost()
                raise AssertionError("the kernel ended without a report")
        return Report(*report)

    def raise_everywhere(self, call: Call) -> NoReturn:
        """Publish a call whose error is set, so that all ranks raise it, and raise it here."""
        if torch.cuda.is_current_stream_capturing():
            assert call.error is not None
            raise copy(call.error) from None  # nothing of a capture has run, so nobody waits
        stream = self.order.begin()
        ticket = self.describe(call, NOTHING)
        self._say(stream, 1, _SAY_THREADS)
        torch.cuda.current_stream().synchronize()
        all_settle = not call.operation.sums and self.world.max_recv_tokens is None
        self.failures.raise_own(ticket, call, all_settle=all_settle)

    def raise_out_of_memory(self, call: Call, error: torch.OutOfMemoryError) -> NoReturn:
        """Raise on all ranks that this one has no memory for what the call returns."""
        text = f"{call.operation.text}: {error}"
        self.raise_everywhere(call.failed(WindowMemoryError(text)))

    @torch.inference_mode(False)
    def grow(self, operation: str, need: int) -> None:
        """Add a chunk where a block of `need` bytes fits; all ranks call it with the same need."""
        self._num_growths += 1  # also of those that fail
        try:
            chunk = self._allocate_everywhere(
                operation, f"growth {self._num_growths}", chunk_bytes(need)
            )
        except PeerError as error:
            if self.world.max_recv_tokens is None:
                raise
            text = f"{error}; did all ranks keep equally many outputs, as max_recv_tokens wants?"
            raise PeerError(text, operation=operation, rank=error.rank) from None
        self.heap.add(chunk)

    def _allocate_everywhere(self, operation: str, topic: str, size: int) -> Allocation:
        """As much memory on every rank, or an error on every rank."""

        def on_all(step: str, make: Callable[[], Made], failure: str, remedy: str) -> Made:
            # Those that waited for one that failed have failed too.
            made, problems = make_on_all(
                make, lambda text: self.bulletin.swap(f"{topic}, {step}", text)
            )
            if problems:
                raise WindowMemoryError(f"{operation}: {failure} ({problems}); {remedy}")
            return cast(Made, made)

        memory = on_all(
            "allocated",
            lambda: self._allocate(size),
            f"no {size} bytes more for the windows of all ranks",
            "free memory, dispatch fewer tokens, or balance the routing",
        )
        # Of a GPU that a rank cannot see, this is the first to tell that it is not reached.
        return on_all(
            "mapped",
            lambda: self._allocator.connect(memory),
            f"not every rank can map the others' {size} bytes more for the windows",
            "look with `fusco doctor`, where it sees all GPUs, for links without peer access, or "
            "free memory, which mapping takes too",
        )

    def _allocate(self, size: int) -> Tensor:
        try:
            return self._allocator.allocate(size)
        except RuntimeError:
            torch.cuda.empty_cache()  # what torch keeps for itself is not free for windows
            return self._allocator.allocate(size)

    def share_device(self) -> None:
        """Claim room on the device for kernels that run beside those of other Shuffles.

        Raises:
            InputError: `num_sms` is not given, or more is claimed than there is. A kernel that
                waits for a peer must not keep out the kernel of another Shuffle that a peer waits
                for.
        """
        total = self.max_sms
        others = sum(each.num_sms for each in _SHARING if each is not self)
        if self.world.num_sms is None or others + self.num_sms > total:
            raise input_error(
                "async_op",
                "num_sms",
                got=repr(self.world.num_sms),
                expected=f"at most {total - others}, what other Shuffles leave of {total}",
                remedy="make the Shuffles with smaller num_sms=",
            )
        _SHARING.add(self)
        self.order.has_room = True

    def close(self) -> None:
        """Give up the room on the device, and the windows; the heap's chunks go when no tensor uses
        them any more."""
        _SHARING.discard(self)
        # Kernels still report, each within a bound; a broken device has nothing to wait for.
        with suppress(RuntimeError):
            self._wait()
        self.order.close()
        # At once, even if an error that somebody keeps holds this object.
        del self.window, self.heap
        self.failures.close()

    def _wait(self) -> None:
        """For all operations, also those that a replayed graph has put on the current stream."""
        self.order.synchronize()
        torch.cuda.current_stream(self.device).synchronize()

    def synchronize(self) -> None:
        """Until all that was asked for is done."""
        self._wait()
        if self.failures.is_pending:
            self.order.begin()
            self.failures.raise_pending()

    @property
    def num_bytes(self) -> int:
        """Size of this rank's windows."""
        return self.window.memory.numel() + self.heap.num_bytes

    def counted(self) -> Counted:
        """What the kernels have counted so far; warns of failures that are still to raise."""
        self._wait()
        self.failures.warn()
        state = self._tables["state"].view(torch.int32)
        return Counted(
            num_rows=int(state[_NUM_ROWS : _NUM_ROWS + 2].view(torch.int64)),
            bytes_to_peer=tuple(self._tables["sent_bytes"].tolist()),
            wait_s=tuple([wait_ns / 1e9 for wait_ns in self._tables["wait_ns"].tolist()]),
        )
