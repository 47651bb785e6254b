"""The permutes and weights that DeepEP leaves to us, around buffers that do as its own do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fusco.bench import BenchConfig
from fusco.bench.baselines import AllToAllBaseline
from fusco.bench.config import DEEPEP_V1_BASELINE, DEEPEP_V2_BASELINE
from fusco.bench.contenders import DEEPEP
from fusco.bench.rows import TorchRows
from fusco.testing.ranks import RankPool

NUM_EXPERTS, HIDDEN, TOP_K = 16, 24, 4


@dataclass(frozen=True)
class Arrived:
    """One rank's tokens with an expert here, by source rank and token."""

    source: list[int]
    token: list[int]
    x: Tensor
    local_NK: Tensor
    weight_NK: Tensor


def bring(x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Arrived:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (x, topk_idx, topk_weights))
    num_local = NUM_EXPERTS // len(everybody)
    source, token, rows, local, weights = [], [], [], [], []
    for rank, (theirs, idx, weight) in enumerate(everybody):
        here = idx.div(num_local, rounding_mode="floor") == dist.get_rank()
        at = here.any(dim=1).nonzero()[:, 0]
        source += [rank] * len(at)
        token += at.tolist()
        rows.append(theirs[at])
        local.append(torch.where(here, idx - dist.get_rank() * num_local, -1)[at])
        weights.append(weight[at])
    return Arrived(source, token, torch.cat(rows), torch.cat(local), torch.cat(weights))


def take_back(partials: Tensor, arrived: Arrived, num_tokens: int) -> Tensor:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (partials, arrived.source, arrived.token))
    y = torch.zeros(num_tokens, HIDDEN)
    for rows, source, token in everybody:
        mine = torch.tensor(source) == dist.get_rank()
        y.index_add_(0, torch.tensor(token)[mine], rows.float()[mine])
    return y.to(partials.dtype)


class Buffer:
    """V1's calls."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int) -> None:
        self.num_tokens = 0

    @staticmethod
    def set_num_sms(number: int) -> None:
        assert number % 2 == 0

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> SimpleNamespace:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda row_bytes, num_ranks: row_bytes)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[None, ...]:
        return (None,) * 5

    def dispatch(self, x: Tensor, *, topk_idx: Tensor, topk_weights: Tensor, **_: object) -> Any:
        a = bring(x, topk_idx, topk_weights)
        num_local = NUM_EXPERTS // dist.get_world_size()
        counts = [int((a.local_NK == e).sum()) for e in range(num_local)]
        return a.x, a.local_NK, a.weight_NK, counts, (a, len(x)), None

    def combine(self, partials: Tensor, handle: Any, config: object) -> tuple[Tensor, ...]:
        return (take_back(partials, *handle),)


class ElasticBuffer:
    """V2's, expanded; rows of an expert in another order."""

    def __init__(self, group: dist.ProcessGroup, **_: object) -> None: ...

    def dispatch(self, x: Tensor, *, topk_idx: Tensor, topk_weights: Tensor, **_: object) -> Any:
        a = bring(x, topk_idx, topk_weights)
        flat = a.local_NK.flatten().flip(0)
        order = len(flat) - 1 - torch.sort(flat, stable=True).indices[int((flat < 0).sum()) :]
        row = order // TOP_K
        pairs = Arrived(
            [a.source[i] for i in row], [a.token[i] for i in row], a.x, a.local_NK, a.weight_NK
        )
        counts = torch.bincount(flat[flat >= 0], minlength=NUM_EXPERTS // dist.get_world_size())
        handle = SimpleNamespace(
            num_unaligned_recv_tokens_per_expert=counts.int(), arrived=pairs, num_tokens=len(x)
        )
        return a.x[row], None, a.weight_NK.flatten()[order], handle, None

    def combine(self, rows: Tensor, handle: Any) -> tuple[Tensor, ...]:
        return (take_back(rows, handle.arrived, handle.num_tokens),)


def same_as_gloo(rank: int, name: str) -> None:
    module = ModuleType("deep_ep")
    vars(module).update(Buffer=Buffer, ElasticBuffer=ElasticBuffer)
    config = BenchConfig(
        num_ranks=8, num_tokens=30, hidden_size=HIDDEN, top_k=TOP_K, num_experts=NUM_EXPERTS
    )
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(30, HIDDEN, generator=generator).bfloat16()
    weights, topk_idx = torch.rand(30, NUM_EXPERTS, generator=generator).topk(TOP_K)
    topk_idx[::3, 1] = -1
    topk_idx[5] = -1
    world = dist.group.WORLD
    assert world is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", module)
        deepep = DEEPEP[name](config, world, TorchRows())
        gloo = AllToAllBaseline(num_experts=NUM_EXPERTS, group=world)
        a, b = (each.dispatch(x, topk_idx, weights) for each in (deepep, gloo))
        assert torch.equal(a.tokens_per_expert, b.tokens_per_expert)
        if name == DEEPEP_V1_BASELINE:
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.row_weights, b.row_weights)
        y, want = deepep.combine(a.tokens, a), gloo.combine(b.tokens, b)
        torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
        assert deepep.wire_bytes % (2 * HIDDEN * 2) == 0
        assert 0 < deepep.wire_bytes < gloo.wire_bytes


@pytest.mark.parametrize("name", [DEEPEP_V1_BASELINE, DEEPEP_V2_BASELINE])
def test_deepep_does_the_same_as_gloo(pool: RankPool, name: str) -> None:
    pool.run(same_as_gloo, name)
