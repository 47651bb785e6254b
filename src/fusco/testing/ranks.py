"""Ranks on one machine: persistent worker processes in one group, each wait bounded.

    with RankPool(4) as pool:
        results = pool.run(train, config)      # train(rank, config) on every rank, by rank

Workers start by *spawn*, so that `run` takes any function that pickles: one at the top of a module.
They end with the pool, and with the process that made it, however that ends.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from fusco import env
from fusco.testing.namespaces import enter_namespace

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_LOCALHOST = "127.0.0.1"
_FINISH = b""
_FINISH_S = 10.0

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""What a group of ranks is made with, by device."""


@dataclass(frozen=True, kw_only=True)
class RankError:
    """What ended one rank's call: an exception there, or the worker's own end."""

    type_name: str
    message: str
    traceback: str


class RankFailure(RuntimeError):
    """At least one rank did not return.

    Attributes:
        errors: by rank, what ended each call that did not return.
        results: by rank, what the other ranks returned.
    """

    def __init__(
        self, call: str, errors: Mapping[int, RankError], results: Mapping[int, Any]
    ) -> None:
        self.errors = dict(sorted(errors.items()))
        self.results = dict(sorted(results.items()))
        num_ranks = len(self.errors) + len(self.results)
        lines = [f"{call} failed on {len(self.errors)} of {num_ranks} ranks"]
        for rank, error in self.errors.items():
            lines.append(f"rank {rank}: {error.type_name}: {error.message}")
        lines.extend(error.traceback for error in self.errors.values() if error.traceback)
        super().__init__("\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where one rank of a test cluster runs.

    Attributes:
        namespace: the network namespace.
        interface: its network interface there.
        switch: the namespace of the switch, and `port` the end of the link there.
        node: the node that the rank is told it is on.
    """

    namespace: str
    interface: str
    switch: str
    port: str
    node: int

    def take(self) -> None:
        """Move this process there, before it opens a connection or starts a thread for one."""
        enter_namespace(self.namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface
        os.environ[env.NODE_ID.name] = str(self.node)


class RankPool:
    """A context manager of `num_ranks` processes that share a default group on loopback.

    Where there are GPUs, rank r has GPU r, modulo their number, as its current device.

    Args:
        num_ranks: how many workers.
        device: "cpu": the group is gloo's. "cuda": CUDA tensors go through NCCL, which refuses
            ranks that share a GPU, but only once it is used.
        seats: one a rank, instead of the loopback: the ranks of a `Cluster`.
        environments: one a rank, variables that it is told beside those of this process.
        timeout_s: longest a `run` takes, and the timeout of the group, in seconds.
        threads_per_rank: threads of torch, OpenMP and numba in each worker.
        grace_s: how long the other ranks may go on, in seconds, once one has failed.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        device: str = "cpu",
        seats: Sequence[Seat] | None = None,
        environments: Sequence[Mapping[str, str]] | None = None,
        timeout_s: float = 180.0,
        threads_per_rank: int = 1,
        grace_s: float = 10.0,
    ) -> None:
        self.num_ranks = num_ranks
        self.device = device
        self.seats = seats
        self.environments = environments
        self.timeout_s = timeout_s
        self.threads_per_rank = threads_per_rank
        self.grace_s = grace_s
        self._workers: list[_Worker] = []
        self._store: Any = None

    def __enter__(self) -> RankPool:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The workers' process ids, by rank; a failed `run` ends them, the next starts others."""
        return tuple(worker.pid for worker in self._workers)

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `fn(rank, *args)` on every rank and return the results by rank.

        Raises:
            RankFailure: a rank raised, died or took longer than `timeout_s`. No rank's state is
                known then, so all workers are ended; the next `run` starts new ones.
        """
        request = pickle.dumps((fn, args))
        if not self._workers:
            self._start()
        try:
            for worker in self._workers:
                # A worker that died between two calls is reported by _collect, with its exit code.
                with contextlib.suppress(BrokenPipeError):
                    worker.pipe.send_bytes(request)
            return self._collect(getattr(fn, "__qualname__", repr(fn)))
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """End the workers. Idempotent, and bounded: a worker that does not finish is killed."""
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):
                worker.pipe.send_bytes(_FINISH)
        deadline = time.monotonic() + _FINISH_S
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self._end()

    def _start(self) -> None:
        # A port on loopback ends with this process, however it ends; a file would stay.
        store = self._store = _tcp_store(0, is_master=True)
        context = multiprocessing.get_context("spawn")
        threads = str(self.threads_per_rank)
        # These are read when libraries load, before any code of ours runs in the worker.
        environment = {
            "OMP_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
            "GLOO_SOCKET_IFNAME": _LOOPBACK,
        }
        if self.num_ranks > torch.cuda.device_count() > 0:
            environment["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        try:
            with _environment(environment):
                for rank in range(self.num_ranks):
                    ours, theirs = context.Pipe()
                    settings = _Settings(
                        rank=rank,
                        num_ranks=self.num_ranks,
                        backend=BACKENDS[self.device],
                        port=store.port,
                        timeout_s=self.timeout_s,
                        num_threads=self.threads_per_rank,
                        seat=None if self.seats is None else self.seats[rank],
                        environment=dict(self.environments[rank]) if self.environments else {},
                    )
                    process = context.Process(target=_work, args=(settings, theirs), daemon=True)
                    process.start()
                    theirs.close()
                    self._workers.append(_Worker(process=process, pipe=ours))
            self._collect("the start of the ranks")
        except BaseException:
            self._end()
            raise

    def _collect(self, call: str) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, RankError] = {}
        deadline = time.monotonic() + self.timeout_s
        waiting = dict(enumerate(self._workers))
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            wait([h for worker in waiting.values() for h in worker.handles], left_s)
            for rank, worker in list(waiting.items()):
                reply = worker.reply()
                if reply is None:
                    continue
                del waiting[rank]
                if isinstance(reply, RankError):
                    errors[rank] = reply
                    deadline = min(deadline, time.monotonic() + self.grace_s)
                else:
                    results[rank] = reply.value
        for rank in waiting:
            message = f"had not returned from {call} when the wait for it ended"
            errors[rank] = RankError(type_name="TimeoutError", message=message, traceback="")
        if errors:
            raise RankFailure(call, errors, results)
        return [results[rank] for rank in range(self.num_ranks)]

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # also a stopped process obeys SIGKILL
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()
        self._store = None


def subgroup(
    ranks: Sequence[int], *, timeout_s: float = 180.0, backend: str | None = None
) -> dist.ProcessGroup | None:
    """The group of these ranks of the default group, made once a process; None to a rank outside.

    Every rank of the default group calls it, in the same order, also those that are not in it.
    With a backend it is never the default group itself.
    """
    return _subgroup(tuple(ranks), timeout_s, backend)


@functools.cache
def _subgroup(
    ranks: tuple[int, ...], timeout_s: float, backend: str | None
) -> dist.ProcessGroup | None:
    if backend is None and ranks == tuple(range(dist.get_world_size())):
        return dist.group.WORLD
    group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), backend=backend)
    return group if dist.get_rank() in ranks else None


@dataclass(frozen=True, kw_only=True)
class _Settings:
    rank: int
    num_ranks: int
    backend: str
    port: int
    timeout_s: float
    num_threads: int
    seat: Seat | None
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Returned:
    value: Any


@dataclass(frozen=True, kw_only=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    @property
    def handles(self) -> tuple[Connection, int]:
        return self.pipe, self.process.sentinel

    def reply(self) -> _Returned | RankError | None:
        """What this worker has answered; None while it still works."""
        # Asked first, so that an answer sent just before the end is not taken for a death.
        ended = not self.process.is_alive()
        try:
            answer = self.pipe.recv_bytes() if self.pipe.poll() else None
        except (EOFError, OSError):  # OSError: it ended within an answer
            self.process.join()
            answer, ended = None, True
        if answer is not None:
            reply: _Returned | RankError = pickle.loads(answer)
            return reply
        if not ended:
            return None
        message = f"the worker ended with exit code {self.process.exitcode}"
        return RankError(type_name="RankDied", message=message, traceback="")


def _work(settings: _Settings, pipe: Connection) -> None:
    # An interrupt from the terminal reaches every process; the parent's answer to it is to end us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send_bytes(_answer(_join_group, settings))
    while request := pipe.recv_bytes():
        pipe.send_bytes(_answer(_call, settings.rank, request))
    dist.destroy_process_group()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _tcp_store(port: int, *, is_master: bool) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        _LOCALHOST, port, is_master=is_master, wait_for_workers=False
    )


def _join_group(settings: _Settings) -> None:
    os.environ.update(settings.environment)
    torch.set_num_threads(settings.num_threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(settings.rank % torch.cuda.device_count())
    # Namespaces do not share the loopback, where the store is; a connection made before stays.
    store = _tcp_store(settings.port, is_master=False)
    if settings.seat is not None:
        settings.seat.take()
    dist.init_process_group(
        settings.backend,
        store=store,
        rank=settings.rank,
        world_size=settings.num_ranks,
        timeout=timedelta(seconds=settings.timeout_s),
    )


def _call(rank: int, request: bytes) -> Any:
    fn, args = pickle.loads(request)
    return fn(rank, *args)


def _answer(fn: Callable[..., Any], *args: Any) -> bytes:
    # Plain pickle: multiprocessing's own would lend tensors in shared memory that outlives us.
    try:
        return pickle.dumps(_Returned(value=fn(*args)))
    except BaseException as error:  # noqa: BLE001 (it travels to the caller of `run`)
        return pickle.dumps(
            RankError(
                type_name=type(error).__name__,
                message=str(error),
                traceback=traceback.format_exc(),
            )
        )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
