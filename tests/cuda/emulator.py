"""A GPU in software: what the kernels of the CUDA engine do, in plain torch on tensors of the CPU.

With it all of the engine runs but its kernels: what the host checks, launches, waits for, wraps and
raises. Kernels run one after the other on a thread, as on a stream, so a launch returns at once.
What they tell other ranks through windows goes through files here, and every rank writes its own
rows. All streams are one, of CUDA graphs only what this engine launches is replayed, and nothing is
said about speed.
"""

from __future__ import annotations

import ctypes
import pickle
import queue
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fusco import api
from fusco.engines.cuda import engine, graphs, session, streams, window
from fusco.engines.cuda.engine import CudaEngine
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.kernels.structs import Verdict
from fusco.engines.cuda.session import Session
from fusco.layout.compact import Links, links_len, part_starts
from fusco.layout.records import Field, Status
from fusco.meeting import Meeting, meet
from fusco.planner import plan_compact
from fusco.testing import dense

_MOST_ID = 0x7FFFFFFF
_POLL_S = 5e-4


@contextmanager
def emulated(folder: Path, *, in_step: bool) -> Iterator[None]:
    """Within it, every engine that this process makes is the CUDA engine on an emulated GPU.

    Args:
        folder: where ranks leave what their kernels tell each other; empty, and the same for all.
        in_step: an operation returns when its kernels are done, so that others may use what it
            brings; else only `Tensor.cpu` waits for them.
    """
    stream = _Stream(in_step=in_step)
    interval = sys.getswitchinterval()
    with ExitStack() as stack:
        # The host spins while it waits, and a kernel needs the interpreter.
        sys.setswitchinterval(1e-5)
        stack.callback(sys.setswitchinterval, interval)
        for place, name, stand_in in _stand_ins(folder, stream):
            stack.enter_context(mock.patch.object(place, name, stand_in, create=True))
        yield
        stream.synchronize()


def _stand_ins(folder: Path, stream: _Stream) -> Iterator[tuple[Any, str, Any]]:
    """Of what, by which name, and what takes its place."""
    yield api, "meet", _meet
    yield api, "make_engine", lambda _, world: CudaEngine(world)
    yield CudaEngine, "device_types", ("cpu",)
    for name in ("dispatch", "combine", "combine_backward"):
        yield CudaEngine, name, stream.keeping(getattr(CudaEngine, name))
    yield engine, "_dense", stream.holding(engine._dense)
    yield Session, "launcher", lambda *given: _Launcher(folder, stream, *given)
    yield session, "TorchAllocator", _Allocator
    proxy = _torch_without_cuda()
    for module in (session, window):
        yield module, "torch", proxy
    for module in (graphs, streams):
        yield module, "capture_on", lambda _: id(stream.graph)
    yield graphs, "captured_pool", lambda _: stream.graph and stream.graph.pool()
    yield Tensor, "cpu", lambda tensor: (stream.synchronize(), tensor)[1]
    yield torch._C, "_cuda_getCurrentRawStream", lambda _: 1
    fakes = {
        "CUDAGraph": lambda: _Graph(stream),
        "Event": lambda: _Event(stream),
        "Stream": lambda *_: stream,
        "current_device": lambda: 0,
        "current_stream": lambda *_: stream,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_properties": lambda *_: _PROPERTIES,
        "graph": stream.capture,
        "is_current_stream_capturing": lambda: stream.graph is not None,
        "set_device": lambda _: None,
        "stream": lambda _: nullcontext(),
        "synchronize": stream.synchronize,
    }
    for name, fake in fakes.items():
        yield torch.cuda, name, fake


def _meet(*given: Any, **named: Any) -> Meeting:
    return replace(meet(*given, **named), engine="cuda")


_PROPERTIES = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)


def _torch_without_cuda() -> Any:
    class Proxy(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    def zeros(*shape: Any, pin_memory: bool = False, **how: Any) -> Tensor:
        del pin_memory
        return torch.zeros(*shape, **how)

    return Proxy(
        device=lambda *_: torch.device("cpu"),
        zeros=zeros,
        as_tensor=lambda span, **_: torch.from_numpy(np.asarray(span)),
    )


class _Stream:
    """Work in its order, on a thread. Memory that work uses is kept until then, as the allocator of
    torch does on a GPU."""

    def __init__(self, *, in_step: bool) -> None:
        self._in_step = in_step
        self._held: list[object] = []
        self.graph: _Graph | None = None  # that is captured
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._work.get()()
            except Exception:  # noqa: BLE001 (the rank that waits for it ends by its timeout)
                traceback.print_exc()

    def add(self, work: Callable[[], None]) -> None:
        if self.graph is None:
            self._work.put(work)
        else:
            self.graph.work.append(work)

    @contextmanager
    def capture(self, graph: _Graph, pool: object = None) -> Iterator[None]:
        """What is added meanwhile is the graph's."""
        self.synchronize()
        self.graph, graph.shared = graph, pool
        try:
            yield
        finally:
            self.graph = None

    def wait_stream(self, other: _Stream) -> None:
        """As all of them are one, nothing needs to be done."""

    def record_event(self) -> _Event:
        event = _Event(self)
        event.record()
        return event

    def keeping(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, with what it takes and returns kept until its work is done."""

        def run(*given: Any) -> Any:
            result = None
            try:
                result = method(*given)
            finally:
                used, self._held = list(_outside_of_heaps((*self._held, *given, result))), []
                self.add(partial(_forget, used))
            if self._in_step and self.graph is None:
                self.synchronize()
            return result

        return run

    def holding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with what it returns kept until the work of a method is done."""

        def run(*given: Any) -> Any:
            self._held.append(result := function(*given))
            return result

        return run

    def synchronize(self) -> None:
        done = threading.Event()
        self.add(done.set)
        assert done.wait(120), "a kernel does not end"


def _outside_of_heaps(things: Iterable[object]) -> Iterator[object]:
    """All but rows in a heap, to which they return as soon as nobody has them."""
    for each in things:
        if isinstance(each, (tuple, list)):
            yield from _outside_of_heaps(each)
        elif not isinstance(each, Tensor) or not any(
            0 <= each.data_ptr() - memory.data_ptr() < memory.numel() for memory in _heaps
        ):
            yield each


def _forget(used: object) -> None:
    del used


class _Event:
    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._done = threading.Event()

    def record(self) -> None:
        self._stream.add(self._done.set)

    def query(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """See `_Stream.wait_stream`."""


class _Graph:
    """What was launched while it was captured, and the memory that this used."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self.work: list[Callable[[], None]] = []
        self.shared: object = None

    def pool(self) -> object:
        return self.shared or id(self)

    def replay(self) -> None:
        for work in self.work:
            self._stream.add(work)
        self._stream.synchronize()


_heaps: weakref.WeakSet[Tensor] = weakref.WeakSet()


class _Allocator:
    """Memory that no other rank writes."""

    def __init__(self, bulletin: Any, topology: Any, device: Any) -> None:
        del bulletin, device
        self._num_ranks = topology.num_ranks

    def allocate(self, num_bytes: int) -> Tensor:
        # As where nobody has written yet: anything.
        memory = torch.full((num_bytes,), 0x5A, dtype=torch.uint8)
        _heaps.add(memory)
        return memory

    def connect(self, memory: Tensor) -> window.Allocation:
        return window.Allocation(memory=memory, address=(memory.data_ptr(),) * self._num_ranks)


class _Launcher:
    """A kernel of one Session, with the structs that it takes."""

    def __init__(
        self, folder: Path, stream: _Stream, of: Session, variant: Any, *arguments: Any
    ) -> None:
        self._stream = stream
        self._arguments = (of.constants, of.call, *arguments)
        self._run = getattr(_Rank(folder, of), variant.name)
        self._element = getattr(torch, variant.element) if variant.element else None

    def __call__(self, stream: int, grid: int, block: int, shared_bytes: int = 0) -> None:
        assert stream == 1
        assert 0 < grid <= _PROPERTIES.multi_processor_count
        assert 0 < block <= 1024
        assert shared_bytes < _PROPERTIES.shared_memory_per_block_optin
        # A launch takes them by value.
        taken = [type(each).from_buffer_copy(each) for each in self._arguments]
        self._stream.add(lambda: self._run(*taken, *([self._element] if self._element else [])))


class _Lost(Exception):
    """A rank did not come."""


class _Rank:
    """The kernels of one rank, as methods; see kernels/*.cu."""

    def __init__(self, folder: Path, of: Session) -> None:
        name = f"{of.bulletin.group_name}-{of.bulletin.name}".replace("/", "-")
        self._folder = folder / name
        self._folder.mkdir(exist_ok=True)
        self._topology = of.world.topology
        self._rank, self._num_ranks = of.rank, of.num_ranks

    def agree(self, world: Any, call: Any) -> None:
        state = _state(world)
        epoch = state.epoch + 1
        verdict = self._agree(world, call, None)
        state.epoch = epoch - (verdict == Verdict.VOID)

    def plan(self, world: Any, call: Any, args: Any) -> None:
        state = _state(world)
        epoch = state.epoch + 1
        shape = (args.num_tokens, world.top_k)
        counts = _at(args.tokens_per_expert, (world.num_local,), torch.int64)
        offsets = _at(args.expert_offsets, (world.num_local + 1,), torch.int32)
        size = links_len(args.num_tokens, world.num_ranks, world.max_tokens, world.top_k)
        links = _at(args.links, (size,), torch.int32)
        if _is_void(world, epoch):
            state.verdict = Verdict.VOID
            links[0] = 0
            counts.zero_(), offsets.zero_()
            return
        idx = _at(args.topk_idx, shape, torch.int64).clone()
        bad = idx[(idx < -1) | (idx >= world.num_experts)].clamp(-_MOST_ID, _MOST_ID).tolist()
        low, high = min([0, *bad]), max([0, *bad])
        idx[(idx < 0) | (idx >= world.num_experts)] = -1
        status = Status.BAD_INPUT if bad and call.status == Status.READY else call.status
        verdict, heads, routings = self._publish(world, call, status, call.plan, idx)
        num_rows, need = 0, 0
        if verdict == Verdict.GO:
            plans = plan_compact(
                routings, self._topology, max_tokens=world.max_tokens, alignment=world.alignment
            )
            mine, rows = plans[self._rank], [each.num_rows for each in plans]
            counts.copy_(mine.tokens_per_expert)
            offsets.copy_(mine.expert_offsets)
            _at(args.pairs, (2, *shape), torch.int32).copy_(mine.pairs)
            links.copy_(mine.links)
            need, has_room = _needs(world, args, rows, heads)
            num_rows = rows[self._rank]
            if not has_room:
                verdict = Verdict.SHORT
        if bad and verdict == Verdict.UNLIKE:
            _report_failure(world, call, verdict, self._rank, low, high)
        elif verdict in (Verdict.UNLIKE, Verdict.STALE) or (
            verdict == Verdict.SHORT and world.static_rows
        ):
            _report_failure(world, call, verdict, -1, -1, need)
        if verdict != Verdict.GO:
            counts.zero_(), offsets.zero_()
        links[0] = epoch if verdict == Verdict.GO else 0
        state.verdict, state.epoch = verdict, epoch
        _report(world, call, verdict, num_rows, need)

    def dispatch(
        self, world: Any, call: Any, args: Any, element: torch.dtype | None = None
    ) -> None:
        state = _state(world)
        epoch = state.epoch
        links = _links(world, args)
        if args.is_planned:
            epoch += 1
            verdict = self._agree(world, call, links)
            need = 0
            if verdict == Verdict.GO:
                rows = [world.static_rows or each for each in links.rows.tolist()]
                need, has_room = _needs(world, args, rows, self._heads)
                verdict = verdict if has_room else Verdict.SHORT
            _report(world, call, verdict, int(links.rows[self._rank]), need)
        else:
            verdict = Verdict.LOST if state.lost else Verdict(state.verdict)
        if verdict == Verdict.GO:
            self._move(world, call, args, epoch, links, element)
        state.epoch = epoch - (args.is_planned and verdict == Verdict.VOID)

    def combine(self, world: Any, call: Any, args: Any, element: torch.dtype) -> None:
        state = _state(world)
        epoch = state.epoch + 1
        links = _links(world, args)
        verdict = self._agree(world, call, links) if args.part == 0 else Verdict(state.verdict)
        width = args.row_bytes // element.itemsize
        out = _at(args.out, (args.num_tokens, width), element)
        shape = (args.num_tokens, world.top_k)
        values = _at(args.pair_values, shape, torch.float32)
        out.zero_()
        if args.pair_values:
            values.zero_()
        if verdict == Verdict.GO:
            num_rows = int(links.rows[self._rank])
            outputs, weights, row_values = zip(
                *self._swap(
                    world,
                    call,
                    f"{epoch}-sums-{args.part}",
                    (
                        _at(args.rows, (num_rows, width), element).clone(),
                        _at(args.row_weights, (num_rows,), torch.float32).clone(),
                        _at(args.row_values, (num_rows,), torch.float32).clone(),
                    ),
                ),
                strict=True,
            )
            rank_TK, slot_TK = _at(args.pairs, (2, *shape), torch.int32).to(torch.int64)
            layout: Any = SimpleNamespace(
                rank_TK={self._rank: rank_TK}, slot_TK={self._rank: slot_TK}
            )
            sums = dense.combine(
                layout,
                outputs,
                self._rank,
                # A rank without rows has no weights either.
                _gather(weights, rank_TK, slot_TK) if any(map(len, weights)) else None,
                node_of_rank=self._topology.node_of_rank,
            )
            out.copy_(sums)
            if args.pair_values:
                values.copy_(_gather(row_values, rank_TK, slot_TK))
        is_over = args.is_last and verdict != Verdict.VOID
        state.epoch = epoch if is_over else epoch - 1
        state.verdict = verdict

    def _move(
        self, world: Any, call: Any, args: Any, epoch: int, links: Links, element: Any
    ) -> None:
        row_bytes = args.row_bytes[: args.num_parts]
        shape = (args.num_tokens, world.top_k)
        sent = (
            [
                _at(address, (args.num_tokens, size), torch.uint8).clone()
                for address, size in zip(args.rows, row_bytes, strict=False)
            ],
            None if element or not args.weights else _at(args.weights, shape, torch.float32),
            _at(args.pairs, (2, *shape), torch.int32).to(torch.int64),
        )
        num_rows = int(links.rows[self._rank])
        chunks = _at(world.heaps, (call.chunk + 1, self._num_ranks), torch.int64)
        base = int(chunks[call.chunk, self._rank]) + call.base
        starts = part_starts(row_bytes, world.static_rows or num_rows)
        parts = [
            _at(base + start, (num_rows, size), torch.uint8)
            for start, size in zip(starts, row_bytes, strict=False)
        ]
        row_weights = _at(base + starts[-2], (num_rows,), torch.float32)
        is_padding = torch.ones(num_rows, dtype=torch.bool)
        got = self._swap(world, call, f"{epoch}-rows", sent)
        for rows, weights, (rank_TK, slot_TK) in got:
            token, k = (rank_TK == self._rank).nonzero(as_tuple=True)
            slot = slot_TK[token, k]
            is_padding[slot] = False
            for part, each in zip(parts, rows, strict=True):
                part[slot] = each[token]
            row_weights[slot] = 1.0 if weights is None else weights[token, k]
        for part in parts:
            part[is_padding] = 0
        row_weights[is_padding] = 0
        if element:
            wide = torch.float64 if element == torch.float64 else torch.float32
            combined = _at(args.combined, tuple(parts[0].shape), torch.uint8)
            grads = parts[0].view(element).to(wide)
            factors = _at(args.weights, (num_rows,), torch.float32).to(wide)
            row_weights.copy_((grads * combined.view(element).to(wide)).sum(dim=1))
            row_weights[is_padding] = 0
            weighed = torch.where(is_padding[:, None], 0, grads * factors[:, None])
            parts[0].view(element).copy_(weighed)

    def _agree(self, world: Any, call: Any, links: Links | None) -> Verdict:
        if _is_void(world, _state(world).epoch + 1):
            return Verdict.VOID
        number = call.plan if links is None else int(links.number)
        verdict, *_ = self._publish(world, call, call.status, number, None)
        if verdict == Verdict.GO and links is not None and not number:
            verdict = Verdict.INVALID
        if verdict not in (Verdict.GO, Verdict.LOST):
            _report_failure(world, call, verdict, -1, -1, 0)
        return verdict

    def _publish(
        self, world: Any, call: Any, status: int, plan: int, payload: Any
    ) -> tuple[Verdict, list[Any], list[Any]]:
        """The verdict, and what all ranks have published."""
        state = _state(world)
        epoch = state.epoch + 1
        if state.pending:
            status = Status.PENDING
        head = (epoch, call.operation, int(status), plan, call.signature, call.base, call.capacity)
        try:
            heads, payloads = zip(
                *self._swap(world, call, f"{epoch}", (head, payload)), strict=True
            )
        except _Lost:
            return Verdict.LOST, [], []
        for rank, each in enumerate(heads):
            index = (epoch & 1) * self._num_ranks + rank
            at = world.records_at + index * world.record_bytes
            own = int(_at(world.windows, (self._num_ranks,), torch.int64)[self._rank])
            _at(own + at, (len(each),), torch.int64).copy_(torch.tensor(each))
        self._heads = list(heads)
        statuses = [each[Field.STATUS] for each in heads]
        if Status.PENDING in statuses:
            verdict = Verdict.STALE
        elif any(statuses) or len({each[Field.OPERATION : Field.BASE] for each in heads}) > 1:
            verdict = Verdict.UNLIKE
        else:
            verdict = Verdict.GO
        return verdict, list(heads), list(payloads)

    def _swap(self, world: Any, call: Any, topic: str, mine: Any) -> list[Any]:
        """What all ranks have to say."""
        path = self._folder / f"{topic}-{self._rank}"
        path.with_suffix(".new").write_bytes(pickle.dumps(mine))
        path.with_suffix(".new").rename(path)
        deadline = time.monotonic() + world.timeout_ns / 1e9
        texts: list[bytes] = []
        for rank in range(self._num_ranks):
            theirs = self._folder / f"{topic}-{rank}"
            while not theirs.exists():
                if _state(world).lost or time.monotonic() > deadline:
                    _report_failure(world, call, Verdict.LOST, rank, -1, 0)
                    raise _Lost
                time.sleep(_POLL_S)
            texts.append(theirs.read_bytes())
        return [pickle.loads(text) for text in texts]


def _at(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The memory at an address; empty where there is none."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if not num_bytes:
        return torch.empty(list(shape), dtype=dtype)
    if not address:
        return torch.empty([0, *shape[1:]], dtype=dtype)
    raw = (ctypes.c_char * num_bytes).from_address(address)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(*shape)


def _state(world: Any) -> Any:
    return structs.State.from_address(world.state)


def _links(world: Any, args: Any) -> Links:
    size = links_len(args.num_tokens, world.num_ranks, world.max_tokens, world.top_k)
    links = _at(args.links, (size,), torch.int32)
    return Links.split(links, args.num_tokens, world.num_ranks, world.top_k)


def _needs(
    world: Any, args: Any, rows: list[int], heads: list[tuple[int, ...]]
) -> tuple[int, bool]:
    """What the neediest rank needs, and whether every rank has room."""
    row_bytes = args.row_bytes[: args.num_parts]
    if world.static_rows:
        return max(rows), max(rows) <= world.static_rows
    sizes = [part_starts(row_bytes, each)[-1] for each in rows]
    room = [each[Field.CAPACITY] for each in heads]
    return max(sizes), all(need <= has for need, has in zip(sizes, room, strict=True))


def _gather(of_rows: Sequence[Tensor], rank_TK: Tensor, slot_TK: Tensor) -> Tensor:
    """By choice, from the rank and row that it went to; 0 where it went nowhere."""
    found = torch.zeros(rank_TK.shape)
    for rank, each in enumerate(of_rows):
        is_there = rank_TK == rank
        found[is_there] = each[slot_TK[is_there]]
    return found


def _is_void(world: Any, epoch: int) -> bool:
    failed = _state(world).pending
    return bool(world.static_rows and failed and failed != epoch)


def _report_failure(
    world: Any, call: Any, verdict: Verdict, awaited: int, item: int, need: int
) -> None:
    state = _state(world)
    if verdict == Verdict.LOST:
        if state.lost:
            return
        state.lost = 1
    elif state.pending:
        return
    state.pending = state.epoch + 1
    failure = structs.Failure.from_address(world.failure)
    failure.epoch, failure.operation, failure.ticket = state.epoch + 1, call.operation, call.ticket
    failure.awaited, failure.item, failure.need = awaited, item, need
    failure.verdict = verdict


def _report(world: Any, call: Any, verdict: Verdict, num_rows: int, need: int) -> None:
    at = call.ticket % structs.REPORTS * ctypes.sizeof(structs.Report)
    report = structs.Report.from_address(world.reports + at)
    report.verdict, report.num_rows, report.need = verdict, num_rows, need
    report.ticket = call.ticket
