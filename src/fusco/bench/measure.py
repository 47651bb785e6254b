"""Measures fusco and the baselines side by side. `run_bench` starts or joins the ranks.

The boundary is the user's: a dispatch goes from (x, topk_idx, topk_weights) to expert-major rows, a
combine from expert outputs to [T, H]; these lie in ordinary memory of the rank or, in place, in
what `Shuffle.empty_like` gave. Planning, the exchange of counts, weights and allocation are inside.
Ranks leave a barrier together, and an iteration lasts until the slowest is done. In each iteration
fusco, the baselines and the copies that the floor comes from follow one another, so that a machine
which slows down slows all of them. What is dispatched changes from iteration to iteration, in
rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fusco.bench.batches import Batch, Outputs, make_batches
from fusco.bench.clock import Clock, EventClock, HostClock, Span
from fusco.bench.config import BenchConfig, check_pattern
from fusco.bench.contenders import Contender, Fusco, make_shuffle, open_lineup
from fusco.bench.floor import Load, count_load
from fusco.bench.graphs import GraphReplay
from fusco.bench.machine import num_cores
from fusco.bench.meters import CopyMeter, LinkMeter, Meter
from fusco.bench.patterns import RoutingSet
from fusco.bench.records import Entrant, Measurement, RankRun, summarise
from fusco.bench.trace import check_trace, load_trace
from fusco.errors import FuscoError, input_error
from fusco.meeting import host_id
from fusco.testing.ranks import RankPool

POOL_TIMEOUT_S = 900.0


def run_bench(
    config: BenchConfig, pool: RankPool | None = None, routing: RoutingSet | None = None
) -> list[Measurement]:
    """Measure one configuration on `pool`, else on the default group, else on a pool of its own.

    Args:
        config: what to measure.
        pool: ranks to measure on, as many as `config.num_ranks`, of the same device.
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
        device=config.device,
        timeout_s=POOL_TIMEOUT_S,
        threads_per_rank=max(1, num_cores() // config.num_ranks),
    ) as own:
        return summarise(config, own.run(measure_rank, config, routing))


def measure_rank(rank: int, config: BenchConfig, routing: RoutingSet | None) -> RankRun:
    """One rank's part, called by every rank of the default group."""
    place = _find_place(config)
    with ExitStack() as stack:
        lineup = open_lineup(config, stack, has_nccl=place.has_nccl)
        topology = lineup.topology
        batches = make_batches(config, topology, routing, place.device)
        outputs = Outputs(config, place.device)
        loads = [
            count_load(each.routing.topk_idx, topology.rank_of_expert, topology.num_ranks)
            for each in batches
        ]
        racers: dict[Entrant, Contender | GraphReplay] = {**lineup.contenders}
        if config.graph:
            room = _most_rows(loads)
            outputs.reserve(room)
            shuffle = stack.enter_context(make_shuffle(config, max_recv_tokens=room))
            replay = GraphReplay(shuffle, batches[0], outputs.rows(room))
            racers[Entrant(engine=shuffle.engine_name, mode="graph")] = replay
        wire_bytes, num_rows = _compare(racers, batches, outputs)
        times = _measure(config, racers, batches, outputs, place)
        return RankRun(
            host=host_id(),
            num_nodes=topology.num_nodes,
            num_threads=torch.get_num_threads(),
            spans=times.spans,
            copy_spans=times.copies["memory"],
            link_spans=times.copies.get("link", []),
            wire_bytes=wire_bytes,
            num_rows=num_rows,
            loads=loads,
            left_out=lineup.left_out,
        )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where this rank's tensors are, and how its time is taken."""

    device: torch.device
    clock: Clock
    has_nccl: bool

    def make_meters(self) -> dict[str, Meter]:
        meters: dict[str, Meter] = {"memory": CopyMeter(self.device)}
        if self.device.type == "cuda":
            meters["link"] = LinkMeter(self.device)
        return meters


def _find_place(config: BenchConfig) -> _Place:
    if config.device == "cpu":
        return _Place(device=torch.device("cpu"), clock=HostClock(), has_nccl=False)
    device = torch.device("cuda", torch.cuda.current_device())
    # By its own name: a rank that is shown one GPU only calls it number 0.
    mine = str(torch.cuda.get_device_properties(device).uuid)
    gpus: list[Any] = [None] * config.num_ranks
    dist.all_gather_object(gpus, mine)
    has_nccl = len(set(gpus)) == len(gpus)
    return _Place(device=device, clock=EventClock(device, has_nccl=has_nccl), has_nccl=has_nccl)


def _most_rows(loads: Sequence[Load]) -> int:
    """That any rank receives in any batch."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, [load.rows for load in loads])
    return int(np.sum(everybody, axis=0).max())


def _compare(
    racers: dict[Entrant, Contender | GraphReplay], batches: Sequence[Batch], outputs: Outputs
) -> tuple[dict[Entrant, dict[str, float]], float]:
    """Run every batch once on each, and raise unless they did the same work.

    Returns:
        mean bytes sent to other ranks in each operation, and mean rows received.
    """
    wire_bytes = {entrant: {"dispatch": 0.0, "combine": 0.0} for entrant in racers}
    num_rows = 0.0
    for batch in batches:
        first = None
        for entrant, contender in racers.items():
            if isinstance(contender, GraphReplay):
                assert first is not None, "an eager one comes first"
                # The expert outputs of the one before are still there.
                contender.load(batch)
                _raise_unless({"sums": _agree(batch, first[1], contender.run())})
                continue
            before = contender.wire_bytes
            d = contender.dispatch(*batch.arguments)
            between = contender.wire_bytes
            y = contender.combine(_expert_outputs(contender, d.tokens, outputs), d)
            wire_bytes[entrant]["dispatch"] += (between - before) / len(batches)
            wire_bytes[entrant]["combine"] += (contender.wire_bytes - between) / len(batches)
            if first is None:
                first = (d, y)
                num_rows += len(d.tokens) / len(batches)
            else:
                _expect_same(batch, first, (d, y))
    return wire_bytes, num_rows


def _expect_same(batch: Batch, fusco: tuple[Any, Tensor], baseline: tuple[Any, Tensor]) -> None:
    same = {
        name: torch.equal(getattr(fusco[0], name), getattr(baseline[0], name))
        for name in ("tokens", "row_weights", "tokens_per_expert")
    }
    _raise_unless({**same, "sums": _agree(batch, fusco[1], baseline[1])})


def _agree(batch: Batch, fusco: Tensor, baseline: Tensor) -> bool:
    # Each contender rounds a token's sum a few times; no term is larger than this.
    weight = batch.routing.topk_weights.abs().sum(dim=1, keepdim=True)
    largest = weight * batch.x.float().abs()
    difference = (fusco.float() - baseline.float()).abs()
    bound = 4 * torch.finfo(batch.x.dtype).eps * largest + torch.finfo(batch.x.dtype).tiny
    return bool((difference <= bound).all())


def _raise_unless(same: dict[str, bool]) -> None:
    if not all(same.values()):
        wrong = ", ".join(name for name, is_same in same.items() if not is_same)
        raise FuscoError(
            f"bench: {wrong}: fusco and the baseline differ, expected the same result; "
            "this is a bug of fusco, please report it with this configuration"
        )


@dataclass(frozen=True, kw_only=True)
class _Times:
    spans: dict[Entrant, dict[str, list[Span]]]
    copies: dict[str, list[Span]]


def _measure(
    config: BenchConfig,
    racers: dict[Entrant, Contender | GraphReplay],
    batches: Sequence[Batch],
    outputs: Outputs,
    place: _Place,
) -> _Times:
    spans: dict[Entrant, dict[str, list[Span]]] = {entrant: {} for entrant in racers}
    meters = place.make_meters()
    copies: dict[str, list[Span]] = {name: [] for name in meters}
    for i in range(config.warmup + config.iterations):
        if i == config.warmup:
            spans = {entrant: {} for entrant in racers}
            copies = {name: [] for name in meters}
        batch = batches[i % len(batches)]
        # Whoever comes second finds other caches than whoever comes first.
        order = list(racers) if i % 2 else list(reversed(racers))
        for entrant in order:
            racer = racers[entrant]
            if isinstance(racer, GraphReplay):
                racer.load(batch)
                timed = {"total": place.clock.time(racer.run)[1]}
            else:
                timed = _time_operations(racer, batch, outputs, place.clock)
                if config.backward and isinstance(racer, Fusco) and entrant.num_sms is None:
                    timed["forward_backward"] = place.clock.time(_train, racer, batch)[1]
            for op, span in timed.items():
                spans[entrant].setdefault(op, []).append(span)
        for name, meter in meters.items():
            copies[name].append(place.clock.time(meter.copy)[1])
    return _Times(spans=spans, copies=copies)


def _time_operations(
    contender: Contender, batch: Batch, outputs: Outputs, clock: Clock
) -> dict[str, Span]:
    d, dispatch_span = clock.time(contender.dispatch, *batch.arguments)
    rows = _expert_outputs(contender, d.tokens, outputs)
    _, combine_span = clock.time(contender.combine, rows, d)
    spans = {"dispatch": dispatch_span, "combine": combine_span}
    del d, rows
    if clock.host_overlaps:
        spans["total"] = clock.time(_dispatch_and_combine, contender, batch, outputs)[1]
    return spans


def _expert_outputs(contender: Contender, tokens: Tensor, outputs: Outputs) -> Tensor:
    if isinstance(contender, Fusco) and contender.in_place:
        return outputs.of(tokens, contender.empty_like(tokens))
    return outputs.of(tokens)


def _dispatch_and_combine(contender: Contender, batch: Batch, outputs: Outputs) -> Tensor:
    d = contender.dispatch(*batch.arguments)
    y: Tensor = contender.combine(outputs.rows(len(d.tokens)), d)
    return y


def _train(contender: Contender, batch: Batch) -> None:
    """Forward and backward of the pair alone: the experts change nothing."""
    x, topk_idx, topk_weights = batch.arguments
    x, topk_weights = x.detach().requires_grad_(), topk_weights.detach().requires_grad_()
    d = contender.dispatch(x, topk_idx, topk_weights)
    contender.combine(d.tokens, d).backward(batch.x)


def _check(config: BenchConfig, routing: RoutingSet | None) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise input_error(
            "bench",
            "device",
            got="'cuda'",
            expected="'cpu', as torch finds no CUDA device",
            remedy="run it on a machine with GPUs, with a torch that is built for them",
        )
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
