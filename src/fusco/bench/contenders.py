"""What is measured: fusco in each of its settings, and what it is compared with."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from fusco.api import Shuffle
from fusco.bench.baselines import AllToAllBaseline
from fusco.bench.config import KEPT_BASELINE, NCCL_BASELINE, BenchConfig
from fusco.bench.nccl import NcclBaseline
from fusco.bench.records import Entrant
from fusco.bench.rows import fastest_rows
from fusco.topology import Topology
from fusco.types import Ablation


class Contender(Protocol):
    """The calls of `Shuffle`, and the bytes sent to other ranks so far."""

    @property
    def wire_bytes(self) -> int: ...

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Any: ...

    def combine(self, expert_outputs: Tensor, dispatched: Any) -> Any: ...


class Fusco:
    """A `Shuffle`.

    Attributes:
        in_place: expert outputs lie where it gives room for them, not in ordinary memory.
    """

    def __init__(self, shuffle: Shuffle, *, in_place: bool = False) -> None:
        self.in_place = in_place
        self.empty_like = shuffle.empty_like
        self._shuffle = shuffle
        self.dispatch = shuffle.dispatch
        self.combine = shuffle.combine

    @property
    def wire_bytes(self) -> int:
        """Row bytes."""
        by_rank = self._shuffle.stats().bytes_to_peer
        return sum(by_rank) - by_rank[self._shuffle.topology.rank]


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """All that one run measures.

    Attributes:
        contenders: fusco first.
        topology: of the Shuffles.
        left_out: by baseline, why it is not measured.
    """

    contenders: dict[Entrant, Contender]
    topology: Topology
    left_out: dict[str, str]


def open_lineup(config: BenchConfig, stack: ExitStack, *, has_nccl: bool) -> Lineup:
    """Make all contenders; collective.

    Args:
        config: what to measure.
        stack: closes what was opened.
        has_nccl: whether NCCL can serve the group.
    """
    contenders: dict[Entrant, Contender] = {}
    left_out = {}
    for num_sms in (None, *config.num_sms):
        shuffle = stack.enter_context(make_shuffle(config, num_sms=num_sms))
        contenders[Entrant(engine=shuffle.engine_name, num_sms=num_sms)] = Fusco(shuffle)
        if config.in_place and num_sms is None:
            entrant = Entrant(engine=shuffle.engine_name, mode="in place")
            contenders[entrant] = Fusco(shuffle, in_place=True)
    for name in config.baselines:
        if name == NCCL_BASELINE and not has_nccl:
            left_out[name] = "it does not serve ranks that share a GPU"
            continue
        entrant, contender = _make_baseline(name, config)
        contenders[entrant] = contender
    return Lineup(contenders=contenders, topology=shuffle.topology, left_out=left_out)


def make_shuffle(config: BenchConfig, **settings: Any) -> Shuffle:
    """A Shuffle for one configuration, with settings that are not None as `Shuffle` takes them."""
    given = {name: value for name, value in settings.items() if value is not None}
    return Shuffle(
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        top_k=config.top_k,
        max_tokens=config.num_tokens,
        dtype=config.torch_dtype,
        engine=config.engine,
        ranks_per_node=config.ranks_per_node,
        ablation=Ablation(
            fusion=config.ablation != "fusion",
            deduplicate=config.ablation != "planner",
            balance=config.ablation != "balancer",
        ),
        **given,
    )


def _make_baseline(name: str, config: BenchConfig) -> tuple[Entrant, Contender]:
    world = dist.group.WORLD
    assert world is not None
    if name == NCCL_BASELINE:
        rows = fastest_rows(config.torch_dtype)
        nccl = NcclBaseline(num_experts=config.num_experts, group=world, rows=rows)
        return Entrant(engine=name, permutes=rows.name), nccl
    gloo = AllToAllBaseline(
        num_experts=config.num_experts, group=world, keep_buffers=name == KEPT_BASELINE
    )
    return Entrant(engine=name), gloo
