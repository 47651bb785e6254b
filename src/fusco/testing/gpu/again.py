"""Calls whose like has been made before, which an engine may serve on a shorter way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist

import fusco
from fusco.testing.cases import (
    Case,
    Inputs,
    device_of,
    draw,
    expect,
    expect_dispatched,
    expect_round_trip,
    expect_same,
    sizes,
)
from fusco.testing.check import Group

_ROUNDS = 5
"""The first calls of a kind are served on the long way."""
_KEPT = 3


def again(**changes: Any) -> Callable[[Group, str], None]:
    """A check of calls that come again alike with other contents, while rows of earlier ones are
    kept, so that the heap grows; and of calls between them that differ in how tensors lie."""

    def check(group: Group, engine: str) -> None:
        rank = dist.get_rank(group)
        case = _case(group, engine, **changes)
        rounds = [draw(case, number) for number in range(_ROUNDS)]
        kept: list[tuple[Inputs, Any, Any]] = []
        with case.shuffle(group, engine) as shuffle:
            served = count_served(shuffle)
            for inputs in rounds:
                kept.append(_round_trip(shuffle, inputs, rank))
            for inputs in rounds:
                kept = [*kept[-_KEPT:], _round_trip(shuffle, inputs, rank)]
            if served is not None:
                expect(len(served) >= 2 * _ROUNDS, f"{len(served)} calls were served in short")
            for inputs, changed in zip(cycle(rounds), _otherwise(case.device), strict=False):
                kept.append(changed(shuffle, inputs, rank))
                kept.append(_round_trip(shuffle, inputs, rank))
            shuffle.synchronize()
        for inputs, d, y in kept:
            expect_dispatched(d, inputs, rank)
            expect_same(y, inputs.sums(rank), "combine")

    return check


def again_wrong(group: Group, engine: str) -> None:
    """Ids out of range and missing rows in calls that are known raise as in others; so does a call
    after the last."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    inputs = draw(_case(group, engine))
    x, idx, weights = inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank)
    wrong = idx.clone()
    if rank == last:
        wrong[0, 0] = inputs.case.num_experts
    with inputs.case.shuffle(group, engine) as shuffle:
        for _ in range(_ROUNDS):
            d = expect_round_trip(shuffle, inputs, rank)
        for _ in range(2):
            _expect_error("expert ids", shuffle.dispatch, x, wrong, weights)
            if d.tokens.shape[0]:
                d = expect_round_trip(shuffle, inputs, rank)
            else:
                expect_round_trip(shuffle, inputs, rank)
        d = shuffle.dispatch(x, idx, weights)
    _expect_error("closed", shuffle.dispatch, x, idx, weights, kind=fusco.ClosedError)
    _expect_error("closed", shuffle.combine, d.tokens, d, kind=fusco.ClosedError)


def _case(group: Group, engine: str, **changes: Any) -> Case:
    common: dict[str, Any] = {
        "num_tokens": sizes((30, 7, 41), group),
        "num_experts": 3 * dist.get_world_size(group),
        "top_k": 4,
        "dtype": torch.bfloat16,
        "device": device_of(engine),
    }
    return Case(**(common | changes))


def count_served(shuffle: Any) -> list[object] | None:
    """A list to which each call adds something that is served on the short way; None where there
    is none."""
    short = shuffle._engine.fast_path
    if short is None:
        return None
    served: list[object] = []

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            result = call(*given)
            if result is not None:
                served.append(call)
            return result

        return run

    for name in ("dispatch", "combine", "dispatch_in_graph", "combine_in_graph"):
        setattr(short, name, counting(getattr(short, name)))
    return served


def _round_trip(shuffle: Any, inputs: Inputs, rank: int) -> tuple[Inputs, Any, Any]:
    d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
    return inputs, d, shuffle.combine(inputs.outputs[rank], d)


def _otherwise(device: str) -> list[Callable[..., tuple[Inputs, Any, Any]]]:
    """Round trips as above, of which a dispatch or a combine is not plain."""

    def spread(shuffle: Any, inputs: Any, rank: int) -> tuple[Inputs, Any, Any]:
        """Rows that lie apart."""

        def apart(rows: torch.Tensor) -> torch.Tensor:
            return torch.stack((rows, rows), dim=-1)[..., 0]

        d = shuffle.dispatch(
            apart(inputs.x[rank]), inputs.topk_idx[rank].T.contiguous().T, inputs.weights_of(rank)
        )
        return inputs, d, shuffle.combine(apart(inputs.outputs[rank]), d)

    def unaligned(shuffle: Any, inputs: Any, rank: int) -> tuple[Inputs, Any, Any]:
        """Rows that no vector begins with."""
        x = inputs.x[rank]
        memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        shifted = memory[1:].view(x.shape).copy_(x)
        d = shuffle.dispatch(shifted, inputs.topk_idx[rank], inputs.weights_of(rank))
        return inputs, d, shuffle.combine(inputs.outputs[rank], d)

    def with_gradients(shuffle: Any, inputs: Any, rank: int) -> tuple[Inputs, Any, Any]:
        served = count_served(shuffle)
        for _ in range(4):
            x = inputs.x[rank].clone().requires_grad_()
            d = shuffle.dispatch(x, inputs.topk_idx[rank], inputs.weights_of(rank))
            y = shuffle.combine(inputs.outputs[rank], d)
            expect(y.requires_grad and d.tokens.requires_grad, "the gradient is lost")
            shuffle.combine(d.tokens, d).sum().backward()
        if served is not None:
            expect(len(served) >= 6, f"{len(served)} calls were served in short")
        return inputs, d, y.detach()

    def halves(shuffle: Any, inputs: Any, rank: int) -> tuple[Inputs, Any, Any]:
        """Tuples, before and after what is plain."""

        def both(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(half.contiguous() for half in rows.chunk(2, dim=1))

        for _ in range(2):
            _round_trip(shuffle, inputs, rank)
            x, weights = both(inputs.x[rank]), inputs.weights_of(rank)
            d = shuffle.dispatch(x, inputs.topk_idx[rank], weights)
            y = shuffle.combine(both(inputs.outputs[rank]), d)
        shuffle.synchronize()
        return inputs, replace(d, tokens=torch.cat(d.tokens, dim=1)), torch.cat(y, dim=1)

    def planned(shuffle: Any, inputs: Inputs, rank: int) -> tuple[Inputs, Any, Any]:
        _, first, _ = _round_trip(shuffle, inputs, rank)
        weights = inputs.weights_of(rank)
        d = shuffle.dispatch(inputs.x[rank], topk_weights=weights, plan=first.plan)
        return inputs, d, shuffle.combine(inputs.outputs[rank], d)

    def on_a_stream(shuffle: Any, inputs: Inputs, rank: int) -> tuple[Inputs, Any, Any]:
        if device == "cpu":
            return _round_trip(shuffle, inputs, rank)
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            _, d, _ = _round_trip(shuffle, inputs, rank)
        current.wait_stream(other)
        # Of a plan that was made on another stream.
        return inputs, d, shuffle.combine(inputs.outputs[rank], d)

    def deep(shuffle: Any, inputs: Any, rank: int) -> tuple[Inputs, Any, Any]:
        """Rows of more dimensions than are served in short."""
        x, outputs = inputs.x[rank], inputs.outputs[rank]
        ones = [1] * 9
        for _ in range(3):
            d = shuffle.dispatch(
                x.view(len(x), *ones, -1), inputs.topk_idx[rank], inputs.weights_of(rank)
            )
            y = shuffle.combine(outputs.view(len(outputs), *ones, x.shape[1]), d)
        return inputs, replace(d, tokens=d.tokens.flatten(1)), y.flatten(1)

    def in_inference(shuffle: Any, inputs: Any, rank: int) -> tuple[Inputs, Any, Any]:
        with torch.inference_mode():
            _round_trip(shuffle, inputs, rank)
        _, d, y = _round_trip(shuffle, inputs, rank)
        expect(not d.expert_offsets.is_inference(), "a plan of the inference mode is used again")
        return inputs, d, y

    def in_a_thread(shuffle: Any, inputs: Any, rank: int) -> tuple[Inputs, Any, Any]:
        """On the same stream."""
        stream = None if device == "cpu" else torch.cuda.current_stream()

        def run() -> tuple[Inputs, Any, Any]:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                return _round_trip(shuffle, inputs, rank)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    return [
        *(spread, unaligned, with_gradients, halves, planned),
        *(on_a_stream, deep, in_inference, in_a_thread),
    ]


def _expect_error(
    says: str,
    call: Callable[..., object],
    *given: object,
    kind: type[fusco.FuscoError] = fusco.InputError,
) -> None:
    try:
        call(*given)
    except kind as error:
        expect(says in str(error), f"another error: {error}")
        return
    raise AssertionError("no error was raised")
