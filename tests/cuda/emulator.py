"""A GPU in software, for tests: all of the CUDA engine runs on CPUs, but its kernels.

What the host checks, launches, waits for, wraps and raises is the engine's own. Kernels, of which
emulated_kernels.py has others, run one after the other on a thread, as on a stream, so a launch
returns at once. All streams are one, of CUDA graphs only what this engine launches is replayed, and
nothing is said about speed.
"""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from emulated_kernels import Kernels
from torch import Tensor

from fusco import api
from fusco.engines.cuda import engine, fast_path, graphs, launch, session, streams, window
from fusco.engines.cuda.engine import CudaEngine
from fusco.engines.cuda.fast_path import FastPath
from fusco.engines.cuda.launch import Launch
from fusco.engines.cuda.session import Session
from fusco.meeting import Meeting, meet
from fusco.types import Dispatched


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
    yield fast_path, "FastPath", partial(_fast_path, stream)
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
    yield launch, "_launch_function", lambda: _launch
    yield torch._C, "_cuda_getCurrentRawStream", lambda _: 1
    yield torch._C, "_cuda_getDevice", lambda: 0
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


def _fast_path(stream: _Stream, *given: Any) -> FastPath:
    def keeping(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            result = call(*given)
            return None if result is None else stream.keeping(lambda *_: result)(*given)

        return run

    made = FastPath(*given)
    for name in ("dispatch", "combine", "dispatch_in_graph", "combine_in_graph"):
        setattr(made, name, keeping(getattr(made, name)))
    return made


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
            self.settle()
            return result

        return run

    def holding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with what it returns kept until the work of a method is done."""

        def run(*given: Any) -> Any:
            self._held.append(result := function(*given))
            return result

        return run

    def settle(self) -> None:
        """Wait, if operations are to come back only when their kernels are done."""
        if self._in_step and self.graph is None:
            self.synchronize()

    def synchronize(self) -> None:
        done = threading.Event()
        self.add(done.set)
        assert done.wait(120), "a kernel does not end"


def _outside_of_heaps(things: Iterable[object]) -> Iterator[object]:
    """All but rows in a heap, to which they return as soon as nobody has them."""
    for each in things:
        if isinstance(each, (tuple, list)):
            yield from _outside_of_heaps(each)
        elif isinstance(each, Dispatched):
            yield from _outside_of_heaps((each.tokens, each.row_weights, each.plan))
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


_launchers: weakref.WeakValueDictionary[int, _Launcher] = weakref.WeakValueDictionary()
_handle = ctypes.c_uint64()


@ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
def _launch(_config: int, function: int, _parameters: int, _extra: None) -> int:
    assert _handle.value == 1
    _launchers[function].add()
    _launchers[function].stream.settle()
    return 0


class _Launcher:
    """A kernel of one Session, with the structs that it takes."""

    def __init__(
        self, folder: Path, stream: _Stream, of: Session, variant: Any, *arguments: Any
    ) -> None:
        self.stream = stream
        self._arguments = (of.constants, of.call, *arguments)
        self._run = getattr(Kernels(folder, of), variant.name)
        self._element = getattr(torch, variant.element) if variant.element else None

    def __call__(self, stream: int, grid: int, block: int, shared_bytes: int = 0) -> None:
        assert stream == 1
        assert 0 < grid <= _PROPERTIES.multi_processor_count
        assert 0 < block <= 1024
        assert shared_bytes < _PROPERTIES.shared_memory_per_block_optin
        self.add()

    def prepare(self, grid: int, block: int, shared_bytes: int) -> Launch:
        """For `_launch`, by a number in place of the function."""
        del grid, block, shared_bytes
        _launchers[id(self)] = self
        return Launch(0, id(self), 0, ctypes.addressof(_handle))

    def add(self) -> None:
        # A launch takes them by value.
        taken = [type(each).from_buffer_copy(each) for each in self._arguments]
        self.stream.add(lambda: self._run(*taken, *([self._element] if self._element else [])))
