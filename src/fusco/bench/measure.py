"""Measures fusco and the baselines side by side. `run_bench` starts or joins the ranks.

The boundary is the user's: a dispatch goes from (x, topk_idx, topk_weights) to expert-major rows, a
combine from expert outputs in ordinary memory of the rank to [T, H]. Planning, the exchange of
counts, weights and allocation are inside. Ranks leave a barrier together, and an iteration lasts
until the slowest is done. In each iteration fusco, the baselines and the copy that the floor comes
from follow one another, so that a machine which slows down slows all of them. What is dispatched
changes from iteration to iteration, in rotation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.api import Shuffle
from fusco.bench.baselines import AllToAllBaseline
from fusco.bench.config import KEPT_BASELINE, BenchConfig, check_pattern
from fusco.bench.floor import CopyMeter
from fusco.bench.patterns import RoutingSet, TokenRouting, make_routing
from fusco.bench.records import Measurement, RankRun, Span, num_cores, summarise
from fusco.bench.trace import check_trace, load_trace
from fusco.errors import FuscoError, input_error
from fusco.meeting import host_id
from fusco.testing.ranks import RankPool
from fusco.types import Ablation

NUM_ROUTINGS = 8
POOL_TIMEOUT_S = 900.0


def run_bench(
    config: BenchConfig, pool: RankPool | None = None, routing: RoutingSet | None = None
) -> list[Measurement]:
    """Measure one configuration on `pool`, else on the default group, else on a pool of its own.

    Args:
        config: what to measure.
        pool: ranks to measure on, as many as `config.num_ranks`.
        routing: measured instead of a generated pattern; `config.pattern` is then its label.

    Returns:
        dispatch, combine and total of fusco, then of each baseline; the same list on every rank
        where the default group was used.

    Raises:
        InputError: the configuration does not fit the ranks, the trace or the routing.
        FuscoError: fusco and a baseline disagree about the result.
        RankFailure: a rank of the pool failed.
    """
    _check(config, routing)
    if pool is not None:
        _check_num_ranks(config, pool.num_ranks)
        return summarise(config, pool.run(measure_rank, config, routing))
    if dist.is_initialized():
        _check_num_ranks(config, dist.get_world_size())
        runs: list[Any] = [None] * config.num_ranks
        dist.all_gather_object(runs, measure_rank(dist.get_rank(), config, routing))
        return summarise(config, runs)
    with RankPool(
        config.num_ranks,
        timeout_s=POOL_TIMEOUT_S,
        threads_per_rank=max(1, num_cores() // config.num_ranks),
    ) as own:
        return summarise(config, own.run(measure_rank, config, routing))


def measure_rank(rank: int, config: BenchConfig, routing: RoutingSet | None) -> RankRun:
    """One rank's part, called by every rank of the default group."""
    with _make_shuffle(config) as shuffle:
        contenders: dict[str, _Contender] = {shuffle.engine_name: _Fusco(shuffle)}
        for name in config.baselines:
            contenders[name] = AllToAllBaseline(
                num_experts=config.num_experts,
                group=_world(),
                keep_buffers=name == KEPT_BASELINE,
            )
        batches = _make_batches(config, shuffle, routing)
        outputs = _Outputs(config)
        wire_bytes, num_rows = _compare(contenders, batches, outputs)
        times = _measure(config, contenders, batches, outputs)
        return RankRun(
            engine=shuffle.engine_name,
            host=host_id(),
            num_nodes=shuffle.topology.num_nodes,
            num_threads=torch.get_num_threads(),
            spans=times.spans,
            copy_spans=times.copy_spans,
            wire_bytes=wire_bytes,
            num_rows=num_rows,
        )


class _Contender(Protocol):
    """What is measured: the calls of `Shuffle`, and the bytes sent to other ranks so far."""

    @property
    def wire_bytes(self) -> int: ...

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Any: ...

    def combine(self, expert_outputs: Tensor, dispatched: Any) -> Any: ...


class _Fusco:
    def __init__(self, shuffle: Shuffle) -> None:
        self._shuffle = shuffle
        self.dispatch = shuffle.dispatch
        self.combine = shuffle.combine

    @property
    def wire_bytes(self) -> int:
        by_rank = self._shuffle.stats().bytes_to_peer
        return sum(by_rank) - by_rank[self._shuffle.topology.rank]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    x: Tensor
    routing: TokenRouting

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.routing.topk_idx, self.routing.topk_weights


class _Outputs:
    """Expert outputs in ordinary memory of this rank, whose pages are there before the clock."""

    def __init__(self, config: BenchConfig) -> None:
        self._memory = torch.zeros((0, config.hidden_size), dtype=config.torch_dtype)

    def of(self, tokens: Tensor) -> Tensor:
        """Rows to combine. They differ between a token's experts, as those of a model do."""
        if len(self._memory) < len(tokens):
            self._memory = torch.zeros_like(tokens)
        rows = self._memory[: len(tokens)]
        factors = (torch.arange(len(tokens)) % 7 + 1) / 8
        return torch.mul(tokens, factors.to(tokens.dtype)[:, None], out=rows)


@dataclass(frozen=True, kw_only=True)
class _Times:
    spans: dict[str, dict[str, list[Span]]]
    copy_spans: list[Span]


def _make_shuffle(config: BenchConfig) -> Shuffle:
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
    )


def _make_batches(
    config: BenchConfig, shuffle: Shuffle, routing: RoutingSet | None
) -> list[_Batch]:
    topology = shuffle.topology
    generator = torch.Generator().manual_seed(config.seed * topology.num_ranks + topology.rank)
    x = torch.randn((config.num_tokens, config.hidden_size), generator=generator)
    if routing is not None:
        routings = [routing.of(i, topology.rank) for i in range(len(routing))]
    else:
        trace = None if config.trace is None else load_trace(config.trace)
        routings = [make_routing(config, topology, i, trace) for i in range(NUM_ROUTINGS)]
    return [_Batch(x=x.to(config.torch_dtype), routing=one) for one in routings]


def _compare(
    contenders: dict[str, _Contender], batches: Sequence[_Batch], outputs: _Outputs
) -> tuple[dict[str, dict[str, float]], float]:
    """Run every batch once on each, and raise unless they did the same work.

    Returns:
        mean bytes sent to other ranks in each operation, and mean rows received.
    """
    wire_bytes = {name: {"dispatch": 0.0, "combine": 0.0} for name in contenders}
    num_rows = 0.0
    for batch in batches:
        results = []
        for name, contender in contenders.items():
            before = contender.wire_bytes
            d = contender.dispatch(*batch.arguments)
            between = contender.wire_bytes
            y = contender.combine(outputs.of(d.tokens), d)
            wire_bytes[name]["dispatch"] += (between - before) / len(batches)
            wire_bytes[name]["combine"] += (contender.wire_bytes - between) / len(batches)
            results.append((d, y))
        num_rows += len(results[0][0].tokens) / len(batches)
        for result in results[1:]:
            _expect_same(batch, results[0], result)
    return wire_bytes, num_rows


def _expect_same(batch: _Batch, fusco: tuple[Any, Tensor], baseline: tuple[Any, Tensor]) -> None:
    same = {
        name: torch.equal(getattr(fusco[0], name), getattr(baseline[0], name))
        for name in ("tokens", "row_weights", "tokens_per_expert")
    }
    # Each contender rounds a token's sum a few times; no term is larger than this.
    weight = batch.routing.topk_weights.abs().sum(dim=1, keepdim=True)
    largest = weight * batch.x.float().abs()
    difference = (fusco[1].float() - baseline[1].float()).abs()
    bound = 4 * torch.finfo(batch.x.dtype).eps * largest + torch.finfo(batch.x.dtype).tiny
    same["sums"] = bool((difference <= bound).all())
    if not all(same.values()):
        wrong = ", ".join(name for name, is_same in same.items() if not is_same)
        raise FuscoError(
            f"bench: {wrong}: fusco and the baseline differ, expected the same result; "
            "this is a bug of fusco, please report it with this configuration"
        )


def _measure(
    config: BenchConfig,
    contenders: dict[str, _Contender],
    batches: Sequence[_Batch],
    outputs: _Outputs,
) -> _Times:
    spans: dict[str, dict[str, list[Span]]] = {
        name: {"dispatch": [], "combine": []} for name in contenders
    }
    copy_spans = []
    meter = CopyMeter()
    for i in range(config.warmup + config.iterations):
        batch = batches[i % len(batches)]
        # Whoever comes second finds other caches than whoever comes first.
        order = list(contenders) if i % 2 else list(reversed(contenders))
        for name in order:
            contender = contenders[name]
            d, dispatch_span = _timed(contender.dispatch, *batch.arguments)
            rows = outputs.of(d.tokens)
            _, combine_span = _timed(contender.combine, rows, d)
            spans[name]["dispatch"].append(dispatch_span)
            spans[name]["combine"].append(combine_span)
            del d
        copy_spans.append(_timed(meter.copy)[1])
    return _Times(
        spans={
            name: {op: all_spans[config.warmup :] for op, all_spans in by_op.items()}
            for name, by_op in spans.items()
        },
        copy_spans=copy_spans[config.warmup :],
    )


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, Span]:
    dist.barrier()
    begin = time.perf_counter()
    result = call(*arguments)
    return result, (begin, time.perf_counter())


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _check(config: BenchConfig, routing: RoutingSet | None) -> None:
    if routing is not None:
        routing.check(config)
        return
    check_pattern(config.pattern)
    if config.trace is not None:
        check_trace(load_trace(config.trace), num_experts=config.num_experts, top_k=config.top_k)


def _check_num_ranks(config: BenchConfig, there: int) -> None:
    if config.num_ranks != there:
        raise input_error(
            "bench",
            "num_ranks",
            got=str(config.num_ranks),
            expected=f"{there}, the ranks that were started",
            remedy="give that number, or leave it out",
        )
