"""The node of GPUs, which is made of torch's operators, over memory of the CPU: the conformance
suite, with slices that travel step by step as NCCL wants them."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fusco
from fusco import engines
from fusco.engines.base import Engine, World
from fusco.engines.cuda import lists, node
from fusco.engines.cuda.lists import list_sums
from fusco.engines.cuda.node import CudaNode
from fusco.engines.cuda.node_memory import NodeHeap, NodeMemory
from fusco.engines.cuda.window import Span
from fusco.engines.reference.sums import partial_sums
from fusco.engines.two_level import TwoLevelEngine, combine_cargo, dispatch, session
from fusco.layout.heap import Block, Heap, Uses
from fusco.testing.cases import Case, draw, expect_same
from fusco.testing.conformance import CHECKS
from fusco.testing.gpu.checks import GPU_CHECKS
from fusco.testing.gpu.runner import run_check
from fusco.testing.ranks import RankPool, subgroup
from fusco.transports import wires
from fusco.transports.bulletin import Bulletin

NAMES = [check.name for check in CHECKS]
MORE = ("random-0", "random-1", "wide-rows", "tuple-of-four", "held", "gradients-repeated")
SMALL_SLICE_BYTES = 2048


class OwnMemory(NodeMemory):
    """Of one rank."""

    device = torch.device("cpu")

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def connect(self, memory: Tensor) -> tuple[Tensor, ...]:
        return (memory,)

    def lend(self, part: Tensor, block: Block, heap: Heap) -> Tensor:
        span = Span(part.data_ptr(), tuple(part.shape), "|u1", block, heap, part)
        return torch.from_numpy(np.asarray(span))

    def make_heap(self) -> Heap:
        return Heap()

    def begin(self) -> None:
        pass

    def settle(self) -> None:
        pass


class NotedMemory(OwnMemory, Uses):
    """Keeps in which order it was asked for what."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def make_heap(self) -> Heap:
        return Heap(uses=self)

    def begin(self) -> None:
        self.steps.append("begin")

    def settle(self) -> None:
        self.steps.append("settle")

    def note_use(self) -> None:
        self.steps.append("note")

    def await_uses(self) -> None:
        self.steps.append("await")


class FileMemory(OwnMemory):
    """Shared files, which ranks of one host map."""

    def __init__(self, folder: Path, world: World, ranks: tuple[int, ...]) -> None:
        self._folder = folder
        self._ranks = ranks
        self._bulletin = Bulletin(world.group, world.timeout_s, part=str(world.topology.node))
        self._count = 0

    def allocate(self, num_bytes: int) -> Tensor:
        self._count += 1
        path = tempfile.mktemp(dir=self._folder)
        self._bulletin.post(f"chunk {self._count}", path)
        return self._map(path, num_bytes)

    def connect(self, memory: Tensor) -> tuple[Tensor, ...]:
        topic = f"chunk {self._count}"
        paths = [self._bulletin.read(topic, rank) for rank in self._ranks]
        return tuple(self._map(path, memory.numel()) for path in paths)

    def _map(self, path: str, num_bytes: int) -> Tensor:
        return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


def make_engine(folder: Path, world: World) -> Engine:
    make_node = partial(CudaNode, make_memory=partial(FileMemory, folder))
    return TwoLevelEngine(world, make_node)


def check_over_files(rank: int, name: str, members: int, folder: Path) -> str | None:
    with over_files(partial(make_engine, folder)):
        return run_check(rank, name, members, "two_level")


@contextlib.contextmanager
def over_files(make: Callable[[World], Engine]) -> Iterator[None]:
    """Let `make` make the engine "two_level", and its slices be small."""
    with (
        mock.patch.dict(engines.FACTORIES, {"two_level": make}),
        mock.patch.object(session, "open_wire", lambda *given: wires.StepWire(*given[:3])),
        mock.patch.object(session, "slice_bytes", return_value=SMALL_SLICE_BYTES),
        # gloo does not say whether a message has come before one waits for it.
        mock.patch.object(wires, "_wait_for", lambda work, *_: work.wait()),
    ):
        yield


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_check(pool: RankPool, name: str, num_ranks: int, tmp_path: Path) -> None:
    outcomes = pool.run(check_over_files, name, num_ranks, tmp_path)
    assert outcomes == [None] * pool.num_ranks


def test_names() -> None:
    assert set(MORE) <= {check.name for check in GPU_CHECKS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [True, False])
def test_sums_have_the_bits_of_the_reference(dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((50, 33), generator=generator).to(dtype)
    weights = torch.rand(50, generator=generator) if weighted else None
    counts = torch.randint(0, 7, (40,), generator=generator)
    list_ptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    item = torch.randint(0, 50, (int(list_ptr[-1]),), generator=generator)
    got = rows.new_empty(40, 33)
    with mock.patch.object(lists, "_CHUNK_BYTES", 7 * 33 * rows.element_size()):
        chunks = list(list_sums(rows, weights, list_ptr, item))
    assert len(chunks) > 5
    for order, sums in chunks:
        got.index_copy_(0, order, sums)
    assert torch.equal(got, partial_sums(rows, weights, list_ptr, item))


def fail_to_connect(rank: int, folder: Path) -> list[str]:
    """One rank cannot map what the others have allocated; the next call works."""
    case = Case(num_tokens=(5, 9, 0, 7), ranks_per_node=2)
    group = subgroup(range(case.num_ranks))
    if group is None:
        return []
    inputs = draw(case)
    problem = RuntimeError("out of address space") if rank == 2 else None
    make = partial(make_engine, folder)
    with over_files(make), case.shuffle(group, "two_level") as shuffle:
        failing = mock.patch.object(FileMemory, "connect", side_effect=problem)
        with (
            failing if problem else contextlib.nullcontext(),
            pytest.raises(fusco.WindowMemoryError) as found,
        ):
            shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank])
        got = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank])
        expect_same(got.tokens, inputs.rows(rank), "tokens")
    return [str(found.value)]


def test_all_ranks_say_which_cannot_connect(pool: RankPool, tmp_path: Path) -> None:
    texts = pool.run(fail_to_connect, tmp_path)[:4]
    for (text,) in texts[2:]:
        assert "rank 2: out of address space" in text
        assert "`fusco doctor` for peer access" in text
    assert all("rank 2" in text for (text,) in texts)


CULPRIT = 1
TIMEOUT_S = 60.0


def fail(rank: int, when: str, problem: BaseException, folder: Path | None) -> tuple[str, float]:
    """One rank cannot go on after the ranks have agreed, and stays; each says what it raised, and
    after how long."""
    case = Case(num_tokens=(50, 90, 0, 70), ranks_per_node=2)
    # Of its own: its connections end.
    group = dist.new_group(range(case.num_ranks), timeout=timedelta(seconds=TIMEOUT_S))
    if rank >= case.num_ranks:
        return "", 0.0
    inputs = draw(case)
    where: Any = dispatch.Hops if when == "dispatch" else combine_cargo.CombineCargo
    failing: Any = contextlib.nullcontext()
    if rank == CULPRIT:
        name = "of" if when == "dispatch" else "end"
        failing = mock.patch.object(where, name, side_effect=problem)
    make = contextlib.nullcontext() if folder is None else over_files(partial(make_engine, folder))
    with make, case.shuffle(group, "two_level") as shuffle:
        begin_s = time.monotonic()
        try:
            with failing:
                got = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank])
                shuffle.combine(inputs.outputs[rank], got)
                # Who has nothing to wait for hears of it here.
                shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank])
        except fusco.PeerError as error:
            text = f"rank {error.rank}"
        except type(problem) as error:
            text = str(error)
        took_s = time.monotonic() - begin_s
        with pytest.raises(fusco.ClosedError):
            shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank])
    return text, took_s


OUT_OF_MEMORY = torch.OutOfMemoryError("no memory for this")
INTERRUPTED = KeyboardInterrupt("by the user")


@pytest.mark.parametrize(
    ("over", "when", "problem"),
    [
        ("files", "dispatch", OUT_OF_MEMORY),
        ("files", "combine", OUT_OF_MEMORY),
        ("windows", "dispatch", OUT_OF_MEMORY),
        ("windows", "combine", OUT_OF_MEMORY),
        ("windows", "dispatch", INTERRUPTED),
    ],
)
def test_a_rank_that_cannot_go_on_is_lost(
    pool: RankPool, over: str, when: str, problem: BaseException, tmp_path: Path
) -> None:
    got = pool.run(fail, when, problem, tmp_path if over == "files" else None)[:4]
    assert got.pop(CULPRIT)[0] == str(problem)
    assert [text for text, _ in got] == [f"rank {CULPRIT}"] * 3
    assert max(took_s for _, took_s in got) < TIMEOUT_S / 4


def test_others_hear_of_memory_when_what_used_it_is_done() -> None:
    memory = NotedMemory()
    topology = SimpleNamespace(rank=0)
    world = SimpleNamespace(group=None, timeout_s=1.0, channel=0, topology=topology)
    with mock.patch.object(node, "Mailbox"):
        own = CudaNode(cast(World, world), [], (0,), lambda *_: memory)
    own._heap.add(memory.connect(memory.allocate(1024)))
    block = own.reserve_largest()
    assert memory.steps == ["begin", "await", "settle"]
    own.release(block)
    assert memory.steps[3:] == ["note"]


def test_a_block_returns_with_its_last_tensor() -> None:
    memory = OwnMemory()
    heap = NodeHeap(memory, 0)
    assert heap.free.reserve_largest().size == 0
    for size in (1024, 4096):
        heap.add(memory.connect(memory.allocate(size)))
    block = heap.free.reserve_largest()
    assert block.size == 4096
    assert heap.free.reserve_largest().size == 1024
    base, zero, size = (np.array([number]) for number in (block.base, 0, block.size))
    (part,) = heap.parts(base, zero, size)
    tensor = heap.lend(block, part)
    view = tensor[100:]
    del tensor
    assert heap.free.reserve_largest().size == 0
    del view
    assert heap.free.reserve_largest() == block
