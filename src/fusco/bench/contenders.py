"""What is measured: fusco in each of its settings, and what it is compared with."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.api import Shuffle
from fusco.bench.baselines import AllToAllBaseline
from fusco.bench.batches import Outputs
from fusco.bench.config import (
    DEEPEP_V1_BASELINE,
    DEEPEP_V2_BASELINE,
    KEPT_BASELINE,
    NCCL_BASELINE,
    BenchConfig,
)
from fusco.bench.deepep import (
    BufferBaseline,
    ElasticBufferBaseline,
    why_no_deepep,
    why_no_elastic_buffer,
)
from fusco.bench.nccl import NcclBaseline
from fusco.bench.records import PAIR_OPS, Entrant
from fusco.bench.rows import fastest_rows
from fusco.bench.static import StaticPair
from fusco.topology import Topology
from fusco.types import Ablation

DEEPEP = {DEEPEP_V1_BASELINE: BufferBaseline, DEEPEP_V2_BASELINE: ElasticBufferBaseline}


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

    @property
    def planned_bytes(self) -> int:
        """Row bytes sent to other nodes."""
        topology = self._shuffle.topology
        to_peer = zip(self._shuffle.stats().bytes_to_peer, topology.node_of_rank, strict=True)
        return sum(sent for sent, node in to_peer if node != topology.node)


def expert_outputs(contender: Contender, tokens: Tensor, outputs: Outputs) -> Tensor:
    """Rows to combine, where the contender wants them."""
    if isinstance(contender, Fusco) and contender.in_place:
        return outputs.of(tokens, contender.empty_like(tokens))
    return outputs.of(tokens)


@dataclass(frozen=True, kw_only=True)
class Racer:
    """A contender, and what of it is timed.

    Attributes:
        entrant: in its main mode.
        contender: whose calls are timed.
        ops_by_entrant: the operations to time, in each mode.
    """

    entrant: Entrant
    contender: Contender | StaticPair
    ops_by_entrant: dict[Entrant, tuple[str, ...]]

    @classmethod
    def of(cls, config: BenchConfig, entrant: Entrant, contender: Contender) -> Racer:
        """All in the main mode. In the other one that GPUs have only the whole pair; of a small
        batch, where the two tell different things, all as well."""
        # Where the host does all, the pair is its parts.
        pair = PAIR_OPS if config.device == "cuda" else ("dispatch", "combine")
        is_fusco = isinstance(contender, Fusco)
        is_bounded = is_fusco and entrant.num_sms is not None
        more = ("forward_backward",) if config.backward and is_fusco and not is_bounded else ()
        entrant = replace(entrant, mode=config.main_mode)
        ops_by_entrant = {entrant: (*pair, *more)}
        if config.main_mode == "queued" and not is_bounded:
            ops_by_entrant[replace(entrant, mode="eager")] = ("total",)
        elif config.device == "cuda" and not is_bounded:
            ops_by_entrant[replace(entrant, mode="queued")] = pair
        return cls(entrant=entrant, contender=contender, ops_by_entrant=ops_by_entrant)

    @classmethod
    def in_place(cls, entrant: Entrant, contender: Fusco) -> Racer:
        """With expert outputs in `Shuffle.empty_like`; the pair is its parts."""
        entrant = replace(entrant, mode="in place")
        ops_by_entrant: dict[Entrant, tuple[str, ...]] = {entrant: ("dispatch", "combine")}
        return cls(entrant=entrant, contender=contender, ops_by_entrant=ops_by_entrant)

    @classmethod
    def static(cls, engine: str, pair: StaticPair, *modes: str) -> Racer:
        """With outputs of a fixed size, in these modes."""
        entrants = [Entrant(engine=engine, mode=mode) for mode in modes]
        ops_by_entrant: dict[Entrant, tuple[str, ...]] = dict.fromkeys(entrants, ("total",))
        return cls(entrant=entrants[0], contender=pair, ops_by_entrant=ops_by_entrant)


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """All that one run measures.

    Attributes:
        racers: fusco first.
        topology: of the Shuffles.
        left_out: by baseline, why it is not measured.
    """

    racers: list[Racer]
    topology: Topology
    left_out: dict[str, str]


def open_lineup(config: BenchConfig, stack: ExitStack, *, has_nccl: bool) -> Lineup:
    """Make all contenders; collective.

    Args:
        config: what to measure.
        stack: closes what was opened.
        has_nccl: whether NCCL can serve the group.
    """
    racers = []
    left_out = {}
    for ablation, num_sms in itertools.product(config.ablations, (None, *config.num_sms)):
        shuffle = stack.enter_context(make_shuffle(config, ablation=ablation, num_sms=num_sms))
        entrant = Entrant(engine=shuffle.engine_name, num_sms=num_sms, ablation=ablation)
        racers.append(Racer.of(config, entrant, Fusco(shuffle)))
        if config.in_place and num_sms is None:
            racers.append(Racer.in_place(entrant, Fusco(shuffle, in_place=True)))
    for name in config.baselines:
        family = name.partition("-")[0]
        if config.device == "cuda" and not has_nccl:
            left_out[family] = "does not serve ranks that share a GPU"
        elif family == "deepep" and (reason := why_no_deepep(config)):
            left_out[family] = reason
        elif name == DEEPEP_V2_BASELINE and (reason := why_no_elastic_buffer()):
            left_out[name] = reason
        else:
            racers.append(Racer.of(config, *_make_baseline(name, config)))
    return Lineup(racers=racers, topology=shuffle.topology, left_out=left_out)


def make_shuffle(config: BenchConfig, *, ablation: str = "none", **settings: Any) -> Shuffle:
    """A Shuffle for one configuration, with one mechanism switched off, and settings that are not
    None as `Shuffle` takes them."""
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
            fusion=ablation != "fusion",
            deduplicate=ablation != "planner",
            balance=ablation != "balancer",
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
    if name in DEEPEP:
        rows = fastest_rows(config.torch_dtype)
        deepep = DEEPEP[name](config, world, rows)
        deepep.tune(torch.device("cuda", torch.cuda.current_device()))
        return Entrant(engine=name, num_sms=deepep.num_sms, permutes=rows.name), deepep
    gloo = AllToAllBaseline(
        num_experts=config.num_experts, group=world, keep_buffers=name == KEPT_BASELINE
    )
    return Entrant(engine=name), gloo
