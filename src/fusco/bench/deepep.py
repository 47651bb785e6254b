"""What fusco is compared with where DeepEP is installed: the same boundary by its two buffers.

`Buffer` (V1) sends a row once a rank, sorted by source; the permutes to experts and the weighted
sum are ours. `ElasticBuffer` (V2) writes expert-major rows itself, in no fixed order within an
expert; the product with the weights it leaves to the user, so that is ours.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.bench.baselines import inverse
from fusco.bench.config import BenchConfig
from fusco.bench.floor import count_load
from fusco.bench.rows import RowMover
from fusco.topology import contiguous_placement

SM_COUNTS = (16, 24, 32, 48, 64, 96)
_TUNING_ROUNDS = 8


def why_no_deepep(config: BenchConfig) -> str:
    """Why neither buffer of DeepEP can be measured; empty if they can."""
    if importlib.util.find_spec("deep_ep") is None:
        return "not installed"
    if config.dtype != "bfloat16":
        return "sends bfloat16 only"
    try:
        importlib.import_module("deep_ep")
    # It asserts that torch has loaded the NCCL it was built with, which fails by a TypeError where
    # none is loaded, and starts its compiler.
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        return f"cannot be imported: {str(error).strip() or type(error).__name__}"
    return ""


def why_no_elastic_buffer() -> str:
    """Why V2 cannot be measured where DeepEP can; empty if it can."""
    import deep_ep

    return "" if hasattr(deep_ep, "ElasticBuffer") else "the installed one has no ElasticBuffer"


@dataclass(frozen=True, kw_only=True)
class DeepEpDispatched:
    """What a dispatch returns.

    Attributes:
        tokens: `[R, H]`, sorted by expert.
        row_weights: `[R]` fp32.
        tokens_per_expert: `[num_local_experts]`.
        handle: DeepEP's own.
        slot_NK: of V1, the expert-major row of each choice of each row that came; below 0 where it
            is not of this rank.
        weight_NK: of V1, the weights of these choices.
    """

    tokens: Tensor
    row_weights: Tensor
    tokens_per_expert: Tensor
    handle: Any
    slot_NK: Tensor | None = None
    weight_NK: Tensor | None = None


class DeepEpBaseline(ABC):
    """Either buffer, with the number of multiprocessors that is fastest on uniform routing."""

    def __init__(self, config: BenchConfig, group: dist.ProcessGroup, rows: RowMover) -> None:
        self._config = config
        self._group = group
        self._rows = rows
        self._num_local = config.num_experts // group.size()
        self._moved: list[Tensor] = []
        self.num_sms = 0

    @property
    def wire_bytes(self) -> int:
        """Row bytes; all ranks together combine sends what dispatch sent."""
        placement = contiguous_placement(self._config.num_experts, self._group.size())
        row_bytes = self._config.hidden_size * self._config.torch_dtype.itemsize
        total = 0
        for topk_idx in self._moved:
            segments = count_load(topk_idx, placement, self._group.size()).segments
            total += int(segments.sum() - segments[self._group.rank()]) * row_bytes
        return total

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> DeepEpDispatched:
        """As `Shuffle.dispatch`."""
        self._moved.append(topk_idx)
        return self._dispatch(x, topk_idx, topk_weights)

    def combine(self, expert_outputs: Tensor, dispatched: DeepEpDispatched) -> Tensor:
        """As `Shuffle.combine`."""
        self._moved.append(self._moved[-1])
        return self._combine(expert_outputs, dispatched)

    def tune(self, device: torch.device) -> None:
        """Keep the fastest of `SM_COUNTS`; collective."""
        config = self._config
        x = torch.zeros((config.num_tokens, config.hidden_size), dtype=config.torch_dtype)
        scores = torch.rand((config.num_tokens, config.num_experts), device=device)
        topk_weights, topk_idx = scores.topk(config.top_k, sorted=False)
        x = x.to(device)

        def pair() -> None:
            d = self._dispatch(x, topk_idx, topk_weights)
            self._combine(d.tokens, d)

        ms = {}
        for num_sms in SM_COUNTS:
            self.num_sms = num_sms
            pair()
            ms[num_sms] = _mean_ms(pair)
        self.num_sms = min(ms, key=lambda num_sms: ms[num_sms])

    @abstractmethod
    def _dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> DeepEpDispatched: ...

    @abstractmethod
    def _combine(self, expert_outputs: Tensor, dispatched: DeepEpDispatched) -> Tensor: ...


class BufferBaseline(DeepEpBaseline):
    """V1."""

    def __init__(self, config: BenchConfig, group: dist.ProcessGroup, rows: RowMover) -> None:
        super().__init__(config, group, rows)
        import deep_ep

        self._class = deep_ep.Buffer
        row_bytes = config.hidden_size * config.torch_dtype.itemsize
        sizes = []
        for num_sms in SM_COUNTS:
            self.num_sms = num_sms
            for each in self._configs():
                sizes.append(each.get_nvl_buffer_size_hint(row_bytes, group.size()))
        self._buffer = deep_ep.Buffer(group, max(sizes))

    def _configs(self) -> tuple[Any, Any]:
        self._class.set_num_sms(self.num_sms)
        num_ranks = self._group.size()
        return (
            self._class.get_dispatch_config(num_ranks),
            self._class.get_combine_config(num_ranks),
        )

    def _dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> DeepEpDispatched:
        per_rank, per_node, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(
            topk_idx, self._config.num_experts
        )
        arrived, local_NK, weight_NK, counts, handle, _ = self._buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            config=self._configs()[0],
        )
        # Rows came sorted by source and token, so a stable sort by expert is the contract's order.
        chosen, choice_of_place = torch.sort(local_NK.flatten().to(torch.int16), stable=True)
        experts = torch.arange(self._num_local + 1, dtype=torch.int16, device=x.device)
        num_none = local_NK.numel() - sum(counts)
        slot_NK = inverse(choice_of_place, choice_of_place.numel()).view_as(local_NK) - num_none
        choice_of_slot = choice_of_place[num_none:]
        return DeepEpDispatched(
            tokens=self._rows.spread(arrived, choice_of_slot, slot_NK),
            row_weights=weight_NK.flatten()[choice_of_slot],
            tokens_per_expert=torch.searchsorted(chosen, experts).diff(),
            handle=handle,
            slot_NK=slot_NK,
            weight_NK=weight_NK,
        )

    def _combine(self, expert_outputs: Tensor, dispatched: DeepEpDispatched) -> Tensor:
        d = dispatched
        assert d.slot_NK is not None, "of V1"
        assert d.weight_NK is not None, "of V1"
        partials = self._rows.weighted_sum(expert_outputs, d.slot_NK, d.weight_NK)
        y: Tensor = self._buffer.combine(partials, d.handle, config=self._configs()[1])[0]
        return y


class ElasticBufferBaseline(DeepEpBaseline):
    """V2, expanded."""

    def __init__(self, config: BenchConfig, group: dist.ProcessGroup, rows: RowMover) -> None:
        super().__init__(config, group, rows)
        import deep_ep

        self._buffer = deep_ep.ElasticBuffer(
            group,
            num_max_tokens_per_rank=config.num_tokens,
            hidden=config.hidden_size,
            num_topk=config.top_k,
        )

    def _dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> DeepEpDispatched:
        tokens, _, row_weights, handle, _ = self._buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_experts=self._config.num_experts,
            num_sms=self.num_sms,
            do_expand=True,
        )
        # Where experts are not padded, these are plain running sums; counts only newer ones have.
        ends = handle.psum_num_recv_tokens_per_expert.to(torch.int64)
        return DeepEpDispatched(
            tokens=tokens,
            row_weights=row_weights,
            tokens_per_expert=ends.diff(prepend=ends.new_zeros(1)),
            handle=handle,
        )

    def _combine(self, expert_outputs: Tensor, dispatched: DeepEpDispatched) -> Tensor:
        d = dispatched
        each_row = torch.arange(len(expert_outputs), device=expert_outputs.device)[:, None]
        weighed = self._rows.weighted_sum(expert_outputs, each_row, d.row_weights[:, None])
        y: Tensor = self._buffer.combine(weighed, d.handle)[0]
        return y


def _mean_ms(call: Callable[[], None]) -> float:
    """Of the slowest rank, so that all choose alike."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_TUNING_ROUNDS):
        call()
    end.record()
    end.synchronize()
    ms = torch.tensor(begin.elapsed_time(end) / _TUNING_ROUNDS)
    dist.all_reduce(ms, op=dist.ReduceOp.MAX)
    return float(ms)
