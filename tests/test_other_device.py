"""The two-level engine keeps rows, lists and weights on their device, whatever it is.

There is no device here but the CPU. So tensors say that they are on another, and hold memory of the
CPU; every operator that would mix the two devices fails as it would on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fusco
from fusco import engines
from fusco.engines.agreement import Call
from fusco.engines.base import ENGINES, Engine, World
from fusco.engines.cuda import lists
from fusco.engines.cuda.node import CudaNode
from fusco.engines.cuda.node_memory import NodeMemory
from fusco.engines.two_level import TwoLevelEngine, dispatch_cargo, session
from fusco.layout.heap import Block, Heap
from fusco.layout.records import Operation
from fusco.testing.cases import Case, draw, expect_same
from fusco.testing.ranks import RankPool, subgroup
from fusco.transports import wires

ELSEWHERE = torch.device("meta")
# What may take indices from the host, or moves tensors between devices.
_MIX = ("aten.index.Tensor", "aten.index_put", "aten.copy_", "aten._to_copy")


class There(Tensor):
    """A tensor that says it is elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=ELSEWHERE
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Makes tensors there where that device is named."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found: list[Tensor] = []
    tree_map(lambda each: found.append(each) if isinstance(each, Tensor) else None, (args, kwargs))
    is_there = [isinstance(each, There) for each in found]
    if any(is_there) and not any(str(func).startswith(name) for name in _MIX):
        foreign = [
            e.shape for e, there in zip(found, is_there, strict=True) if not there and e.dim()
        ]
        assert not foreign, f"{func} mixes devices: {foreign}"
    device = kwargs.pop("device", None)
    result_there = any(is_there) if device is None else torch.device(device) == ELSEWHERE
    kwargs.pop("pin_memory", None)

    def unwrap(each: Any) -> Any:
        return each.held if isinstance(each, There) else each

    got = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if str(func).split(".")[1].endswith("_") and isinstance(args[0], Tensor):
        return args[0]
    if not result_there:
        return got.clone() if isinstance(got, Tensor) and any(is_there) else got
    return tree_map(lambda each: There(each) if isinstance(each, Tensor) else each, got)


class MemoryThere(NodeMemory):
    """Of one rank."""

    device = ELSEWHERE

    def __init__(self, world: World, ranks: tuple[int, ...]) -> None:
        assert len(ranks) == 1

    def allocate(self, num_bytes: int) -> Tensor:
        return There(torch.zeros(num_bytes, dtype=torch.uint8))

    def connect(self, memory: Tensor) -> tuple[Tensor, ...]:
        return (memory,)

    def lend(self, part: Tensor, block: Block, heap: Heap) -> Tensor:
        return part

    def make_heap(self) -> Heap:
        return Heap()

    def begin(self) -> None:
        pass

    def settle(self) -> None:
        pass


class WireThere(wires.StepWire):
    """Sends what is held."""

    def receive(self, slot: Tensor, peer: int, step: int) -> wires.Moving:
        return super().receive(slot.held, peer, step)

    def send(self, slot: Tensor, peer: int, step: int) -> wires.Moving:
        return super().send(slot.held, peer, step)


def new_tensor(like: Tensor, data: Any) -> Tensor:
    """As `Tensor.new_tensor`, which asks no operator."""
    made = torch.tensor(data, dtype=like.dtype)
    return There(made) if isinstance(like, There) else made


def make_engine(world: World) -> Engine:
    return TwoLevelEngine(world, functools.partial(CudaNode, make_memory=MemoryThere))


def round_trip(rank: int, dtype: torch.dtype, fusion: bool) -> None:
    case = Case(
        num_tokens=(30, 0, 41, 7),
        hidden_size=24,
        top_k=4,
        num_experts=12,
        dtype=dtype,
        routing="holes",
        expert_alignment=4,
        ranks_per_node=1,
    )
    group = subgroup(range(case.num_ranks))
    if group is None:
        return
    inputs = draw(case)
    weights = inputs.weights_of(rank)
    assert weights is not None
    with (
        mock.patch.dict(engines.FACTORIES, {"two_level": make_engine}),
        mock.patch.object(
            session, "open_wire", lambda group, _, to, __: WireThere(group, torch.device("cpu"), to)
        ),
        mock.patch.object(session, "slice_bytes", return_value=512),
        mock.patch.object(wires, "_wait_for", lambda work, *_: work.wait()),
        mock.patch.object(Tensor, "new_tensor", new_tensor),
        mock.patch.object(lists, "as_words", lambda *segments: segments),
        mock.patch.object(dispatch_cargo, "as_words", lambda *segments: segments),
        Elsewhere(),
        case.shuffle(group, "two_level", ablation=fusco.Ablation(fusion=fusion)) as shuffle,
    ):
        engine = ENGINES[shuffle._key]
        x, there = There(inputs.x[rank]), There(weights)
        idx, outputs = There(inputs.topk_idx[rank]), There(inputs.outputs[rank])
        got = engine.dispatch(Call(operation=Operation.DISPATCH), (x,), there, idx)
        again = engine.dispatch(
            Call(operation=Operation.DISPATCH_PLANNED, plan=0), (x,), there, got.plan
        )
        back = engine.combine(
            Call(operation=Operation.COMBINE, plan=0),
            (outputs,),
            got.row_weights,
            got.plan,
            got.row_weights,
        )
        elsewhere = [got.plan.tokens_per_expert, got.plan.expert_offsets, *got.rows, *back.sums]
        assert all(isinstance(each, There) for each in elsewhere)
    for delivery in (got, again):
        expect_same(delivery.rows[0].held, inputs.rows(rank), "tokens")
        expect_same(delivery.row_weights.held, inputs.row_weights(rank), "weights")
    expect_same(back.sums[0].held, inputs.sums(rank), "sums")
    assert back.pair_values is not None
    expect_same(back.pair_values.held, weights * (inputs.topk_idx[rank] >= 0), "values")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_round_trip(pool: RankPool, dtype: torch.dtype) -> None:
    pool.run(round_trip, dtype, True)


def test_without_fusion(pool: RankPool) -> None:
    pool.run(round_trip, torch.float32, False)
