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

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fusco.bench.batches import Batch, Outputs, make_batches
from fusco.bench.config import BenchConfig, check_device, check_pattern
from fusco.bench.contenders import Contender, Fusco, Racer, make_shuffle, open_lineup
from fusco.bench.floor import Load, count_load
from fusco.bench.network import LinkUse, read_link
from fusco.bench.patterns import RoutingSet
from fusco.bench.place import find_place
from fusco.bench.race import race
from fusco.bench.records import Entrant, Measurement, RankRun
from fusco.bench.same import compare
from fusco.bench.static import STATIC_MODES, StaticPair
from fusco.bench.summary import summarise
from fusco.bench.trace import check_trace, load_trace
from fusco.errors import input_error
from fusco.machine import num_cores
from fusco.meeting import host_id
from fusco.testing.cluster import Cluster
from fusco.testing.ranks import RankPool, Seat

POOL_TIMEOUT_S = 900.0
LINK_REPEATS = 3


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
    with _own_pool(config) as own:
        return summarise(config, own.run(measure_rank, config, routing, own.seats))


@contextmanager
def _own_pool(config: BenchConfig) -> Iterator[RankPool]:
    with ExitStack() as stack:
        seats = None
        if config.nic is not None:
            cluster = Cluster(config.ranks_of_host, rate=config.nic)
            seats = stack.enter_context(cluster).seats
        yield stack.enter_context(
            RankPool(
                config.num_ranks,
                device=config.device,
                seats=seats,
                timeout_s=POOL_TIMEOUT_S,
                threads_per_rank=max(1, num_cores() // config.num_ranks),
            )
        )


def measure_rank(
    rank: int,
    config: BenchConfig,
    routing: RoutingSet | None,
    seats: Sequence[Seat] | None = None,
) -> RankRun:
    """One rank's part, called by every rank of the default group; `seats` of a test cluster."""
    place = find_place(config)
    with ExitStack() as stack:
        lineup = open_lineup(config, stack, has_nccl=place.has_nccl)
        topology = lineup.topology
        batches = make_batches(config, topology, routing, place.device)
        outputs = Outputs(config, place.device)
        loads = [
            count_load(each.routing.topk_idx, topology.rank_of_expert, topology.num_ranks)
            for each in batches
        ]
        racers = list(lineup.racers)
        if config.graph:
            room = _most_rows(loads)
            outputs.reserve(room)
            shuffle = stack.enter_context(
                make_shuffle(config, ablation=config.ablations[0], max_recv_tokens=room)
            )
            for is_captured, modes in STATIC_MODES.items():
                rows = outputs.rows(room)
                pair = StaticPair(shuffle, batches[0], rows, is_captured=is_captured)
                racers.append(Racer.static(shuffle.engine_name, pair, *modes))
        wire_bytes, num_rows = compare(racers, batches, outputs)
        times = race(config, racers, batches, outputs, place)
        return RankRun(
            host=host_id(),
            num_nodes=topology.num_nodes,
            num_threads=torch.get_num_threads(),
            spans=times.spans,
            copy_spans=times.copies["memory"],
            link_spans=times.copies.get("link", []),
            wire_bytes={
                entrant: wire_bytes[racer.entrant]
                for racer in racers
                for entrant in racer.ops_by_entrant
            },
            num_rows=num_rows,
            loads=loads,
            head_start_ms={mode: clock.head_start_ms for mode, clock in place.clocks.items()},
            links={} if seats is None else _use_of_links(racers, batches[0], outputs, seats[rank]),
            left_out=lineup.left_out,
        )


def _use_of_links(
    racers: Sequence[Racer], batch: Batch, outputs: Outputs, seat: Seat
) -> dict[Entrant, dict[str, LinkUse]]:
    """Run a batch some more times on each, and read this rank's link before and after."""
    found: dict[Entrant, dict[str, LinkUse]] = {}
    for racer in racers:
        contender = racer.contender
        assert not isinstance(contender, StaticPair), "test clusters have no GPUs"

        def use(contender: Contender = contender) -> LinkUse:
            return read_link(
                seat, contender.planned_bytes if isinstance(contender, Fusco) else None
            )

        begin = use()
        for _ in range(LINK_REPEATS):
            d = contender.dispatch(*batch.arguments)
        between = use()
        for _ in range(LINK_REPEATS):
            contender.combine(outputs.of(d.tokens), d)
        found[racer.entrant] = {
            "dispatch": between.since(begin, LINK_REPEATS),
            "combine": use().since(between, LINK_REPEATS),
        }
    return found


def _most_rows(loads: Sequence[Load]) -> int:
    """That any rank receives in any batch."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, [load.rows for load in loads])
    return int(np.sum(everybody, axis=0).max())


def _check(config: BenchConfig, routing: RoutingSet | None) -> None:
    check_device(config.device)
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
