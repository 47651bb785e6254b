"""The measurement itself: all racers by turns, iteration after iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fusco.bench.batches import Batch, Outputs
from fusco.bench.clock import Clock, Span
from fusco.bench.config import BenchConfig
from fusco.bench.contenders import Contender, Racer, expert_outputs
from fusco.bench.place import Place
from fusco.bench.records import Entrant
from fusco.bench.static import StaticPair


@dataclass(frozen=True, kw_only=True)
class Times:
    """An entry an iteration: by entrant and operation, and by meter."""

    spans: dict[Entrant, dict[str, list[Span]]]
    copies: dict[str, list[Span]]


def race(
    config: BenchConfig,
    racers: Sequence[Racer],
    batches: Sequence[Batch],
    outputs: Outputs,
    place: Place,
) -> Times:
    """Time every racer, and the copies that the floor comes from, in each iteration; collective."""
    meters = place.make_meters()
    meter_clock = place.clocks["queued" if config.device == "cuda" else "eager"]
    times = _no_times(racers, meters)
    for i in range(config.warmup + config.iterations):
        if i == config.warmup:
            times = _no_times(racers, meters)
        batch = batches[i % len(batches)]
        # Whoever comes second finds other caches than whoever comes first.
        for racer in racers if i % 2 else reversed(racers):
            for entrant, ops in racer.ops_by_entrant.items():
                clock = place.clocks[entrant.mode]
                for op, span in _time(racer.contender, ops, batch, outputs, clock).items():
                    times.spans[entrant].setdefault(op, []).append(span)
        for name, meter in meters.items():
            times.copies[name].append(meter_clock.time(meter.copy)[1])
    return times


def _no_times(racers: Sequence[Racer], meters: dict[str, Any]) -> Times:
    entrants = [entrant for racer in racers for entrant in racer.ops_by_entrant]
    return Times(spans={entrant: {} for entrant in entrants}, copies={name: [] for name in meters})


def _time(
    contender: Contender | StaticPair,
    ops: tuple[str, ...],
    batch: Batch,
    outputs: Outputs,
    clock: Clock,
) -> dict[str, Span]:
    if isinstance(contender, StaticPair):
        contender.load(batch)
        return {"total": clock.time(contender.run)[1]}
    spans = {}
    if "dispatch" in ops:
        d, spans["dispatch"] = clock.time(contender.dispatch, *batch.arguments)
        rows = expert_outputs(contender, d.tokens, outputs)
        spans["combine"] = clock.time(contender.combine, rows, d)[1]
        del d, rows  # whose memory the next dispatch may use
    whole: dict[str, Callable[[Contender, Batch], object]] = {
        "total": partial(_dispatch_and_combine, outputs),
        "forward_backward": forward_backward,
    }
    for op, call in whole.items():
        if op in ops:
            spans[op] = clock.time(call, contender, batch)[1]
    return spans


def _dispatch_and_combine(outputs: Outputs, contender: Contender, batch: Batch) -> Tensor:
    d = contender.dispatch(*batch.arguments)
    y: Tensor = contender.combine(outputs.rows(d.tokens.shape[0]), d)
    return y


def forward_backward(contender: Contender, batch: Batch) -> None:
    """Forward and backward of the pair alone: the experts change nothing."""
    x, topk_idx, topk_weights = batch.arguments
    x, topk_weights = x.detach().requires_grad_(), topk_weights.detach().requires_grad_()
    d = contender.dispatch(x, topk_idx, topk_weights)
    contender.combine(d.tokens, d).backward(batch.x)
