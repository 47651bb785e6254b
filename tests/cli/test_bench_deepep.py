"""The permutes and weights that DeepEP leaves to us, around buffers that do as its own do."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fusco.bench import BenchConfig
from fusco.bench.baselines import AllToAllBaseline
from fusco.bench.config import DEEPEP_V1_BASELINE, DEEPEP_V2_BASELINE
from fusco.bench.contenders import DEEPEP, open_lineup
from fusco.bench.deepep import why_no_elastic_buffer
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
    """V1's calls, with all the arguments that they take."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object = None,
    ) -> None: ...

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> SimpleNamespace:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda hidden_bytes, num_ranks: 1 << 20)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: object = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[None, ...]:
        return (None,) * 5

    def dispatch(
        self,
        x: Tensor,
        handle: object = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: object = None,
        previous_event: object = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        assert topk_idx is not None
        assert topk_weights is not None
        a = bring(x, topk_idx, topk_weights)
        num_local = NUM_EXPERTS // dist.get_world_size()
        counts = [int((a.local_NK == e).sum()) for e in range(num_local)]
        return a.x, a.local_NK, a.weight_NK, counts, (a, len(x)), None

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: object = None,
        config: object = None,
        previous_event: object = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, None]:
        return take_back(x, *handle), None, None


class ElasticBuffer:
    """V2's, expanded, as of its first release: later ones take and return more. Rows of an expert
    are in another order."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        assert num_max_tokens_per_rank * hidden * num_topk > 0

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: object = None,
        previous_event_before_epilogue: object = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: object = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> Any:
        assert do_expand
        assert num_experts == NUM_EXPERTS
        assert topk_idx is not None
        assert topk_weights is not None
        a = bring(x, topk_idx, topk_weights)
        flat = a.local_NK.flatten().flip(0)
        order = len(flat) - 1 - torch.sort(flat, stable=True).indices[int((flat < 0).sum()) :]
        row = order // TOP_K
        pairs = Arrived(
            [a.source[i] for i in row], [a.token[i] for i in row], a.x, a.local_NK, a.weight_NK
        )
        counts = torch.bincount(flat[flat >= 0], minlength=NUM_EXPERTS // dist.get_world_size())
        handle = SimpleNamespace(
            psum_num_recv_tokens_per_expert=counts.cumsum(0).int(),
            arrived=pairs,
            num_tokens=len(x),
        )
        return a.x[row], None, a.weight_NK.flatten()[order], handle, None

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: object = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: object = None,
        previous_event_before_epilogue: object = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, None]:
        return take_back(x, handle.arrived, handle.num_tokens), None, None


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


def left_out_with(rank: int, folder: str) -> dict[str, str]:
    config = BenchConfig(
        num_ranks=8,
        num_tokens=30,
        hidden_size=HIDDEN,
        top_k=TOP_K,
        num_experts=NUM_EXPERTS,
        device="cuda",
        baselines=(DEEPEP_V1_BASELINE, DEEPEP_V2_BASELINE),
    )
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return open_lineup(config, stack, has_nccl=True).left_out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert False, 'Invalid NCCL versions'", "Invalid NCCL versions"),
        ("raise AssertionError", "AssertionError"),
        ("import deep_ep._C", "No module named 'deep_ep._C'"),
    ],
)
def test_deepep_that_cannot_be_imported_is_left_out(
    pool: RankPool, tmp_path: Path, code: str, reason: str
) -> None:
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text(code)
    expected = {"deepep": f"cannot be imported: {reason}"}
    assert pool.run(left_out_with, str(tmp_path)) == [expected] * pool.num_ranks


def test_deepep_without_the_elastic_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    assert "no ElasticBuffer" in why_no_elastic_buffer()
