"""The node of GPUs, which is made of torch's operators, over memory of the CPU: the conformance
suite, with slices that travel step by step as NCCL wants them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fusco import engines
from fusco.engines.base import Engine, World
from fusco.engines.cuda.lists import list_sums
from fusco.engines.cuda.node import CudaNode
from fusco.engines.cuda.node_memory import NodeHeap, NodeMemory, Span
from fusco.engines.reference.sums import partial_sums
from fusco.engines.two_level import TwoLevelEngine, session
from fusco.testing.conformance import CHECKS
from fusco.testing.gpu.checks import GPU_CHECKS
from fusco.testing.gpu.runner import run_check
from fusco.testing.ranks import RankPool
from fusco.transports import wires
from fusco.transports.bulletin import Bulletin

NAMES = [check.name for check in CHECKS]
MORE = ("random-0", "random-1", "wide-rows", "tuple-of-four", "held", "gradients-repeated")
SMALL_SLICE_BYTES = 2048


class FileMemory(NodeMemory):
    """Shared files, which ranks of one host map."""

    device = torch.device("cpu")

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

    def lend(self, part: Tensor, give_back: Callable[[], None]) -> Tensor:
        return torch.from_numpy(np.asarray(Span(part, give_back)))

    def begin(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def _map(self, path: str, num_bytes: int) -> Tensor:
        return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


def make_engine(folder: Path, world: World) -> Engine:
    make_node = functools.partial(CudaNode, make_memory=functools.partial(FileMemory, folder))
    return TwoLevelEngine(world, make_node)


def check_over_files(rank: int, name: str, members: int, folder: Path) -> str | None:
    factories = {"two_level": functools.partial(make_engine, folder)}
    with (
        mock.patch.dict(engines.FACTORIES, factories),
        mock.patch.object(session, "open_wire", wires.StepWire),
        mock.patch.object(session, "slice_bytes", return_value=SMALL_SLICE_BYTES),
        # gloo does not say whether a message has come before one waits for it.
        mock.patch.object(wires, "_wait_for", lambda work, *_: work.wait()),
    ):
        return run_check(rank, name, members, "two_level")


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
    order, sums = list_sums(rows, weights, list_ptr, item)
    got = torch.empty_like(sums).index_copy_(0, order, sums)
    assert torch.equal(got, partial_sums(rows, weights, list_ptr, item))


class OwnMemory(NodeMemory):
    """Of one rank."""

    device = torch.device("cpu")

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def connect(self, memory: Tensor) -> tuple[Tensor, ...]:
        return (memory,)

    def lend(self, part: Tensor, give_back: Callable[[], None]) -> Tensor:
        return torch.from_numpy(np.asarray(Span(part, give_back)))

    def begin(self) -> None:
        pass

    def settle(self) -> None:
        pass


def test_a_block_returns_with_its_last_tensor() -> None:
    memory = OwnMemory()
    heap = NodeHeap(memory, 0)
    assert heap.reserve_largest().size == 0
    for size in (1024, 4096):
        heap.add(memory.connect(memory.allocate(size)))
    block = heap.reserve_largest()
    assert block.size == 4096
    assert heap.reserve_largest().size == 1024
    base, zero, size = (np.array([number]) for number in (block.base, 0, block.size))
    (part,) = heap.parts(base, zero, size)
    tensor = heap.lend(block, part)
    view = tensor[100:]
    del tensor
    assert heap.reserve_largest().size == 0
    del view
    assert heap.reserve_largest() == block
