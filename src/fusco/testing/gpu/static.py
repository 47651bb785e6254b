"""Outputs of fixed size: no wait of the host, CUDA graphs, and what happens when they are full."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import fusco
from fusco.testing.cases import Case, Inputs, device_of, draw, expect, expect_same, sizes
from fusco.testing.check import Group
from fusco.testing.gpu.again import count_served

Result = TypeVar("Result")

_FEW_SMS = 8


def static_rows(group: Group, engine: str) -> None:
    """Rows of several routings arrive where they would otherwise, and sums are the same."""
    rank = dist.get_rank(group)
    case = _case(group, engine, expert_alignment=4)
    rounds = [draw(case, number) for number in range(6)]
    size = max(_most_rows(inputs) for inputs in rounds)
    # More multiprocessors than there are is all of them.
    with case.shuffle(group, engine, max_recv_tokens=size, num_sms=10_000) as shuffle:
        served = count_served(shuffle)
        done = [_call(shuffle, inputs, rank, size) for inputs in rounds]
        shuffle.synchronize()
        if served is not None:
            expect(len(served) > len(rounds), f"{len(served)} calls were served in short")
    for inputs, (d, y) in zip(rounds, done, strict=True):
        _expect(d, y, inputs, rank, size)


def graphs(group: Group, engine: str) -> None:
    """A captured pair, replayed with other rows and other routing."""
    rank = dist.get_rank(group)
    case = _case(group, engine, dtype=torch.bfloat16)
    rounds = [draw(case, number) for number in range(4)]
    size = max(_most_rows(inputs) for inputs in rounds)
    first = rounds[0]
    x, idx = _rows(first, rank).clone(), first.topk_idx[rank].clone()
    weights, outputs = _weights(first, rank).clone(), _outputs(first, rank, size)
    with case.shuffle(group, engine, max_recv_tokens=size) as shuffle:

        def pair() -> tuple[fusco.Dispatched[Tensor], Tensor]:
            d = shuffle.dispatch(x, idx, weights)
            return d, shuffle.combine(outputs, d)

        graph, (d, y) = _capture(pair)
        got = []
        for inputs in rounds:
            x.copy_(_rows(inputs, rank))
            idx.copy_(inputs.topk_idx[rank])
            weights.copy_(_weights(inputs, rank))
            outputs.copy_(_outputs(inputs, rank, size))
            graph.replay()
            got.append((d.tokens.clone(), d.tokens_per_expert.clone(), y.clone()))
        shuffle.synchronize()
        torch.cuda.synchronize()
    for inputs, (tokens, counts, sums) in zip(rounds, got, strict=True):
        want = inputs.rows(rank)
        assert isinstance(want, Tensor)
        expect_same(counts, inputs.layout.tokens_per_expert[rank], "tokens_per_expert")
        expect_same(tokens[: want.shape[0]], want, "tokens of a replay")
        expect_same(sums, inputs.sums(rank), "combine of a replay")


def graphs_beside(group: Group, engine: str) -> None:
    """Operations that a graph holds on two streams come in the order of their calls."""
    rank = dist.get_rank(group)
    case = _case(group, engine)
    first, second = draw(case, 0), draw(case, 1)
    size = max(_most_rows(first), _most_rows(second))
    with case.shuffle(group, engine, max_recv_tokens=size, num_sms=_FEW_SMS) as shuffle:

        def both() -> list[tuple[fusco.Dispatched[Tensor], Tensor]]:
            d = _dispatch(shuffle, first, rank)
            beside, event = shuffle.dispatch(
                _rows(second, rank), second.topk_idx[rank], second.weights_of(rank), async_op=True
            )
            y = shuffle.combine(_outputs(first, rank, size), d)
            event.wait()
            return [(d, y), (beside, shuffle.combine(_outputs(second, rank, size), beside))]

        graph, results = _capture(both)
        for _ in range(20):
            graph.replay()
        shuffle.synchronize()
        for inputs, (d, y) in zip((first, second), results, strict=True):
            _expect(d, y, inputs, rank, size)


def graphs_memory(group: Group, engine: str) -> None:
    """A replay writes what another graph holds only where they share a pool."""
    rank = dist.get_rank(group)
    case = _case(group, engine)
    inputs, others = draw(case, 0), draw(case, 1)
    size = max(_most_rows(inputs), _most_rows(others))
    x, idx = _rows(inputs, rank).clone(), inputs.topk_idx[rank].clone()
    outputs = _outputs(inputs, rank, size)
    with case.shuffle(group, engine, max_recv_tokens=size) as shuffle:

        def pair() -> tuple[fusco.Dispatched[Tensor], Tensor]:
            d = shuffle.dispatch(x, idx)
            return d, shuffle.combine(outputs, d)

        first, (d, _) = _capture(pair)
        address = d.tokens.data_ptr()
        del d
        second, (held, _) = _capture(pair)
        second.replay()
        x.copy_(_rows(others, rank))
        idx.copy_(others.topk_idx[rank])
        first.replay()
        shuffle.synchronize()
        want = inputs.rows(rank)
        assert isinstance(want, Tensor)
        expect_same(held.tokens[: want.shape[0]], want, "tokens after another graph's replay")
        _, (shared, _) = _capture(pair, sharing=first)
        expect(shared.tokens.data_ptr() == address, "a graph of the same pool takes other memory")


def overflow(group: Group, engine: str) -> None:
    """Too many rows give every expert none, and raise on all ranks what would be enough; then what
    fits goes through, and the plan that was never made is refused."""
    rank = dist.get_rank(group)
    case = _case(group, engine)
    fitting = _case(group, engine, num_tokens=sizes((2, 0, 1), group))
    inputs, few = draw(case), draw(fitting)
    size, need = _most_rows(few), _most_rows(inputs)
    outputs = _outputs(few, rank, size)
    with case.shuffle(group, engine, max_recv_tokens=size) as shuffle:
        with _warning("synchronize"):  # by the dispatch where it knows already
            d = _dispatch(shuffle, inputs, rank)
            _expect_nothing(d, shuffle.combine(outputs, d))
            shuffle.stats()
        # What does nothing need not be done by all.
        for _ in range(rank):
            later = _dispatch(shuffle, few, rank)
            _expect_nothing(later, shuffle.combine(outputs, later))
        text = _error_of(shuffle.synchronize, fusco.WindowMemoryError)
        expect(f"max_recv_tokens={need}" in text, f"overflow: {text}")
        good, y = _call(shuffle, few, rank, size)
        shuffle.synchronize()
        _expect(good, y, few, rank, size)
        of_no_plan = replace(good, plan=d.plan)

        def combine_and_wait() -> None:
            shuffle.combine(outputs, of_no_plan)
            shuffle.synchronize()

        text = _error_of(combine_and_wait, fusco.InputError)
        expect("plan" in text, f"a plan that was never made: {text}")
        _dispatch(shuffle, inputs, rank)
        with _warning(f"max_recv_tokens={need}"):
            shuffle.close()


def graphs_overflow(group: Group, engine: str) -> None:
    """A replay that overflows gives captured experts nothing to do, whatever its routing."""
    rank = dist.get_rank(group)
    inputs, few = (
        draw(_case(group, engine, num_tokens=(size,) * dist.get_world_size(group)))
        for size in (40, 2)
    )
    size, num_tokens = _most_rows(few), 40
    x = torch.zeros((num_tokens, 64), device=device_of(engine))
    idx = torch.full((num_tokens, 4), -1, device=device_of(engine))
    idx[:2] = few.topk_idx[rank]
    ones = x.new_ones((size, x.shape[1]))
    case = _case(group, engine, num_tokens=(num_tokens,) * dist.get_world_size(group))
    with case.shuffle(group, engine, max_recv_tokens=size) as shuffle:

        def layer() -> tuple[fusco.Dispatched[Tensor], Tensor]:
            d = shuffle.dispatch(x, idx)
            # As a grouped product, this writes as many rows as the offsets say.
            is_row = torch.arange(size, device=x.device) < d.expert_offsets[-1:]
            return d, shuffle.combine(torch.where(is_row[:, None], ones, torch.nan), d)

        graph, (d, y) = _capture(layer)
        graph.replay()
        idx.copy_(inputs.topk_idx[rank])
        graph.replay()
        _expect_nothing(d, y)
        text = _error_of(shuffle.synchronize, fusco.WindowMemoryError)
        expect(f"max_recv_tokens={_most_rows(inputs)}" in text, f"overflow: {text}")
        idx[2:] = -1
        idx[:2] = few.topk_idx[rank]
        graph.replay()
        shuffle.synchronize()
        expect_same(d.tokens_per_expert, few.layout.tokens_per_expert[rank], "tokens_per_expert")


def _expect_nothing(d: fusco.Dispatched[Tensor], y: Tensor) -> None:
    expect(not d.tokens_per_expert.any(), f"{d.tokens_per_expert} rows of nothing")
    expect(not d.expert_offsets.any(), f"{d.expert_offsets} are offsets of nothing")
    expect(not y.any(), "sums of nothing are not zero")


@contextmanager
def _warning(text: str) -> Iterator[None]:
    """Just one comes, in which this text is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = [str(each.message) for each in caught]
    expect(len(told) == 1 and text in told[0], f"warnings: {told}")


def _error_of(call: Callable[[], object], kind: type[Exception]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def _capture(
    calls: Callable[[], Result], sharing: torch.cuda.CUDAGraph | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            calls()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=None if sharing is None else sharing.pool()):
        result = calls()
    return graph, result


def _case(
    group: Group,
    engine: str,
    *,
    num_tokens: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    expert_alignment: int = 1,
) -> Case:
    return Case(
        num_tokens=sizes((40, 7, 23), group) if num_tokens is None else num_tokens,
        hidden_size=64,
        top_k=4,
        num_experts=3 * dist.get_world_size(group),
        dtype=dtype,
        expert_alignment=expert_alignment,
        device=device_of(engine),
    )


def _most_rows(inputs: Inputs) -> int:
    """Rows of the rank that receives most of them, with their padding."""
    return max(int(offsets[-1]) for offsets in inputs.layout.expert_offsets)


def _rows(inputs: Inputs, rank: int) -> Tensor:
    rows = inputs.x[rank]
    assert isinstance(rows, Tensor)
    return rows


def _weights(inputs: Inputs, rank: int) -> Tensor:
    weights = inputs.weights_of(rank)
    assert weights is not None
    return weights


def _outputs(inputs: Inputs, rank: int, size: int) -> Tensor:
    """Of experts, with rows that mean nothing up to the fixed size."""
    outputs = inputs.outputs[rank]
    return torch.cat((outputs, outputs.new_full((size - outputs.shape[0], *outputs.shape[1:]), 7)))


def _dispatch(shuffle: fusco.Shuffle, inputs: Inputs, rank: int) -> fusco.Dispatched[Tensor]:
    return shuffle.dispatch(_rows(inputs, rank), inputs.topk_idx[rank], inputs.weights_of(rank))


def _call(
    shuffle: fusco.Shuffle, inputs: Inputs, rank: int, size: int
) -> tuple[fusco.Dispatched[Tensor], Tensor]:
    d = _dispatch(shuffle, inputs, rank)
    return d, shuffle.combine(_outputs(inputs, rank, size), d)


def _expect(d: fusco.Dispatched[Tensor], y: Tensor, inputs: Inputs, rank: int, size: int) -> None:
    want = inputs.rows(rank)
    assert isinstance(want, Tensor)
    expect(d.tokens.shape[0] == size, f"{d.tokens.shape[0]} rows, not {size}")
    expect_same(d.tokens_per_expert, inputs.layout.tokens_per_expert[rank], "tokens_per_expert")
    expect_same(d.expert_offsets, inputs.layout.expert_offsets[rank], "expert_offsets")
    expect_same(d.tokens[: want.shape[0]], want, "tokens")
    expect_same(d.row_weights[: want.shape[0]], inputs.row_weights(rank), "row_weights")
    expect_same(y, inputs.sums(rank), "combine")
