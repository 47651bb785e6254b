"""Streams, devices, and errors that are found after a call has returned."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist

import fusco
from fusco.engines.cuda.window import waiting
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
from fusco.testing.check import Group, NotApplicable

_FEW_SMS = 8
_LONG_S = 30.0
_LONG_CYCLES = 50_000_000
"""Of a GPU, longer than a call takes."""
_MANY_TOKENS = 1500
"""So that all multiprocessors have some."""
_ROUNDS = 4


def late_errors(group: Group, engine: str) -> None:
    """A wrong combine of one rank raises there; what follows does nothing, up to the next dispatch,
    which raises on all ranks, and the one after it works. A rank without others has all raised."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    inputs = draw(_case(group, engine))
    outputs = inputs.outputs[rank]
    with inputs.case.shuffle(group, engine) as shuffle:
        for _ in range(2):
            d = _dispatch(shuffle, inputs, rank)
            if rank == last:
                wrong = torch.cat((outputs, outputs.new_ones(1, *outputs.shape[1:])))
                _expect_error(partial(shuffle.combine, wrong, d))
            else:
                shuffle.combine(outputs, d)
            shuffle.combine(outputs, d)
            if last:
                _expect_error(partial(_dispatch, shuffle, inputs, rank))
            expect_round_trip(shuffle, inputs, rank)


def one_combine_too_many(group: Group, engine: str) -> None:
    """A rank that combines where the others dispatch: they raise at once, it does in its next
    dispatch, and they do again, since these belong together; then all is well."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    inputs = draw(_case(group, engine))
    with inputs.case.shuffle(group, engine, timeout_s=_LONG_S) as shuffle:
        dispatch = partial(_dispatch, shuffle, inputs, rank)
        d = dispatch()
        if rank == last:
            shuffle.combine(inputs.outputs[rank], d)
        else:
            _expect_error(dispatch, fusco.DisagreementError, "combine with plan")
        if last:
            _expect_error(dispatch, fusco.DisagreementError, "dispatch with a new plan")
        expect_round_trip(shuffle, inputs, rank)


def claims(group: Group, engine: str) -> None:
    """Where one rank has no room for a call beside others, all raise."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    inputs = draw(_case(group, engine))
    num_sms = torch.cuda.get_device_properties().multi_processor_count * 2 // 3
    make = partial(inputs.case.shuffle, group, engine, timeout_s=_LONG_S, num_sms=num_sms)
    with make() as one, make() as other:
        _, event = _dispatch(one, inputs, rank, async_op=True)
        event.wait()
        if rank != last:
            one.close()
        dispatch = partial(_dispatch, other, inputs, rank, async_op=True)
        _expect_error(dispatch, says="num_sms")
        one.close()
        d, event = dispatch()
        event.wait()
        expect_dispatched(d, inputs, rank)
        expect_same(other.combine(inputs.outputs[rank], d), inputs.sums(rank), "combine")


def closed(group: Group, engine: str) -> None:
    """A Shuffle that is closed has given its windows back, and needs no garbage collector for that,
    also where an error is kept whose frames hold it. What is dropped in a capture does no harm."""
    rank = dist.get_rank(group)
    inputs = draw(_case(group, engine))
    gc.disable()
    try:
        with inputs.case.shuffle(group, engine) as shuffle:
            outputs = inputs.outputs[rank]
            for _ in range(_ROUNDS):
                d = _dispatch(shuffle, inputs, rank)
                shuffle.combine(outputs, d)
            session = cast(Any, shuffle)._engine._works.session
            window = weakref.ref(session.window.memory)
            heap = [weakref.ref(each.memory) for each in session.heap.chunks]
            works = weakref.ref(cast(Any, shuffle)._engine._works)
            del session
            kept = None
            try:
                shuffle.combine(torch.cat((outputs, outputs.new_ones(1, *outputs.shape[1:]))), d)
            except fusco.InputError as error:
                kept = error
        expect("rows" in str(kept), f"another error: {kept}")
        expect(window() is None, "the window of a closed Shuffle is still there")
        del d, kept  # the error keeps the rows
        expect(all(each() is None for each in heap), "the heap of a closed Shuffle is still there")
        expect(works() is None, "what a closed Shuffle worked with is still there")
        expect(not waiting, "the memory of a closed Shuffle waits to be freed")
    finally:
        gc.enable()
    with inputs.case.shuffle(group, engine) as shuffle:
        held = [_dispatch(shuffle, inputs, rank)]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        held.clear()
        inputs.outputs[rank].sum()


def two_at_once(group: Group, engine: str) -> None:
    """Two shuffles beside each other and beside the current stream."""
    rank = dist.get_rank(group)
    inputs = draw(_case(group, engine))
    case = inputs.case
    done: list[tuple[Any, Any]] = []
    with (
        case.shuffle(group, engine, num_sms=_FEW_SMS) as one,
        case.shuffle(group, engine, num_sms=_FEW_SMS) as other,
    ):
        for _ in range(_ROUNDS):
            begun = [_dispatch(each, inputs, rank, async_op=True) for each in (one, other)]
            for shuffle, (d, event) in zip((one, other), begun, strict=True):
                event.wait()
                y, event = shuffle.combine(inputs.outputs[rank], d, async_op=True)
                event.wait()
                done.append((d, y))
            d = _dispatch(one, inputs, rank)
            done.append((d, one.combine(inputs.outputs[rank], d)))
        one.synchronize()
        other.synchronize()
    for d, y in done:
        expect_dispatched(d, inputs, rank)
        expect_same(y, inputs.sums(rank), "combine")


def taking_turns(group: Group, engine: str) -> None:
    """Kernels of two Shuffles that do not fit on a GPU together come in the order of their calls,
    also on streams of which ranks are late with different ones."""
    rank = dist.get_rank(group)
    case = replace(_case(group, engine), num_tokens=(_MANY_TOKENS,) * dist.get_world_size(group))
    inputs = draw(case)
    current = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in range(2)]
    with ExitStack() as stack:
        shuffles = [stack.enter_context(case.shuffle(group, engine)) for _ in streams]
        for _ in range(_ROUNDS):
            dispatched = [_dispatch(shuffle, inputs, rank) for shuffle in shuffles]
            sums = []
            for number, stream in enumerate(streams):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    if number == rank % 2:
                        _keep_busy(engine)
                    sums.append(shuffles[number].combine(inputs.outputs[rank], dispatched[number]))
            for stream, each in zip(streams, sums, strict=True):
                current.wait_stream(stream)
                expect_same(each, inputs.sums(rank), "combine")


def _keep_busy(engine: str) -> None:
    if device_of(engine) == "cuda":
        torch.cuda._sleep(_LONG_CYCLES)


def dropped_rows(group: Group, engine: str) -> None:
    """Rows that are dropped on a stream which still reads them are not written before it has."""
    if device_of(engine) != "cuda":
        raise NotApplicable("needs a GPU")
    rank = dist.get_rank(group)
    first, second = (draw(_case(group, engine), number) for number in range(2))
    reader = torch.cuda.Stream()
    is_tried = False
    with first.case.shuffle(group, engine) as shuffle:
        for _ in range(_ROUNDS):
            d = _dispatch(shuffle, first, rank)
            want = d.tokens.clone()
            reader.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(reader):
                _keep_busy(engine)
                got = d.tokens.clone()
                address = d.tokens.data_ptr()
                del d
            d = _dispatch(shuffle, second, rank)
            is_tried |= d.tokens.data_ptr() == address
            reader.synchronize()
            expect_same(got, want, "rows read after they were dropped")
            expect_dispatched(d, second, rank)
            del d
    expect(is_tried, "no rows came to where others were dropped")


def other_streams(group: Group, engine: str) -> None:
    """Calls on changing streams, and with another current device, come in their order."""
    rank = dist.get_rank(group)
    rounds = [draw(_case(group, engine), number) for number in range(_ROUNDS)]
    device = torch.device("cuda", torch.cuda.current_device())
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    done = []
    with rounds[0].case.shuffle(group, engine) as shuffle:
        for number, inputs in enumerate(rounds):
            torch.cuda.set_device((device.index + number) % torch.cuda.device_count())
            try:
                with torch.cuda.stream(streams[number % len(streams)]):
                    torch.cuda.set_device((device.index + number) % torch.cuda.device_count())
                    d = _dispatch(shuffle, inputs, rank)
                    done.append((d, shuffle.combine(inputs.outputs[rank], d)))
            finally:
                torch.cuda.set_device(device)
        shuffle.synchronize()
    for inputs, (d, y) in zip(rounds, done, strict=True):
        expect_dispatched(d, inputs, rank)
        expect_same(y, inputs.sums(rank), "combine")


def _case(group: Group, engine: str) -> Case:
    return Case(
        num_tokens=sizes((30, 0, 41), group),
        hidden_size=64,
        top_k=4,
        num_experts=3 * dist.get_world_size(group),
        dtype=torch.bfloat16,
        device=device_of(engine),
    )


def _dispatch(shuffle: fusco.Shuffle, inputs: Inputs, rank: int, **how: Any) -> Any:
    return shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank), **how)


def _expect_error(
    call: Callable[[], object],
    kind: type[fusco.FuscoError] = fusco.InputError,
    says: str = "rows",
) -> None:
    try:
        call()
    except kind as error:
        expect(says in str(error), f"another error: {error}")
        return
    raise AssertionError("no error was raised")
