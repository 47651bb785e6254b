"""Short checks of the contract for a user's own machine and group: `fusco selftest`.

A check makes all its calls before it compares anything, so that a rank where the answer is wrong
keeps no other waiting. The full suite is in the project's tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

import fusco
from fusco.testing.cases import (
    Case,
    Routing,
    device_of,
    draw,
    expect,
    expect_dispatched,
    expect_round_trip,
    expect_same,
    sizes,
    two_nodes,
)
from fusco.testing.check import Check, Group, NotApplicable
from fusco.testing.gradients import expect_gradients


def _case(group: Group, engine: str, **changes: object) -> Case:
    num_ranks = dist.get_world_size(group)
    case = Case(
        num_tokens=sizes((13, 40, 5), group),
        num_experts=4 * num_ranks,
        device=device_of(engine),
    )
    return replace(case, **changes)  # type: ignore[arg-type]


def _round_trips(case: Case, group: Group, engine: str) -> None:
    inputs = draw(case)
    with case.shuffle(group, engine) as shuffle:
        expect_round_trip(shuffle, inputs, dist.get_rank(group))


def _dtype(dtype: torch.dtype) -> Callable[[Group, str], None]:
    def check(group: Group, engine: str) -> None:
        _round_trips(_case(group, engine, dtype=dtype), group, engine)

    return check


def _routing(routing: Routing) -> Callable[[Group, str], None]:
    def check(group: Group, engine: str) -> None:
        _round_trips(_case(group, engine, routing=routing, top_k=6), group, engine)

    return check


def _empty_ranks(group: Group, engine: str) -> None:
    _round_trips(_case(group, engine, num_tokens=sizes((0, 33, 0), group)), group, engine)


def _no_weights(group: Group, engine: str) -> None:
    _round_trips(_case(group, engine, weighted=False), group, engine)


def _alignment(group: Group, engine: str) -> None:
    _round_trips(_case(group, engine, expert_alignment=16), group, engine)


def _placement(group: Group, engine: str) -> None:
    num_ranks = dist.get_world_size(group)
    placement = tuple(expert % num_ranks for expert in range(4 * num_ranks))
    _round_trips(_case(group, engine, placement=placement), group, engine)


def _nodes(group: Group, engine: str) -> None:
    _round_trips(two_nodes(_case(group, engine, top_k=6, dtype=torch.bfloat16)), group, engine)


def _bytes(group: Group, engine: str) -> None:
    _round_trips(
        _case(group, engine, payload="bytes", hidden_size=48 if engine == "cuda" else 37),
        group,
        engine,
    )


def _scaled(group: Group, engine: str) -> None:
    _round_trips(
        _case(group, engine, payload="scaled", hidden_size=512, dtype=torch.bfloat16), group, engine
    )


def _plan_reuse(group: Group, engine: str) -> None:
    case, rank = _case(group, engine), dist.get_rank(group)
    first, second = draw(case), draw(case, 1)
    second = second.routed_as(first)
    with case.shuffle(group, engine) as shuffle:
        plan = shuffle.dispatch(first.x[rank], first.topk_idx[rank], first.weights_of(rank)).plan
        expect_round_trip(shuffle, second, rank, plan)


def _growth(group: Group, engine: str) -> None:
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    small = _case(group, engine, num_tokens=(2,) * num_ranks)
    large = _case(group, engine, num_tokens=(200,) * num_ranks, routing="one-expert")
    with large.shuffle(group, engine) as shuffle:
        failures = []
        for inputs in (draw(small), draw(large), draw(small, 1)):
            try:
                expect_round_trip(shuffle, inputs, rank)
            except AssertionError as failure:
                failures.append(str(failure))
        expect(not failures, "; ".join(failures))


def _inference(group: Group, engine: str) -> None:
    """What a Shuffle keeps is for every mode, also where it was made or has grown in inference."""
    rank = dist.get_rank(group)
    case = _case(group, engine)
    inputs = [draw(case, number) for number in range(3)]
    with torch.inference_mode():
        shuffle = case.shuffle(group, engine)
    with shuffle:
        for _ in range(2):
            kept = []
            for each in inputs:
                with torch.inference_mode():
                    kept.append(expect_round_trip(shuffle, each, rank))
                kept.append(expect_round_trip(shuffle, each, rank))
            x = inputs[0].x[rank]
            assert isinstance(x, torch.Tensor)
            x = x.clone().requires_grad_()
            d = shuffle.dispatch(x, inputs[0].topk_idx[rank], inputs[0].weights_of(rank))
            shuffle.combine(d.tokens, d).sum().backward()
            expect(
                x.grad is not None and bool(x.grad.cpu().isfinite().all()), "there is no gradient"
            )


def _gradients(group: Group, engine: str) -> None:
    expect_gradients(_case(group, engine, dtype=torch.float64), group, engine)


def _strided(group: Group, engine: str) -> None:
    case = _case(group, engine, dtype=torch.float64)
    expect_gradients(case, group, engine, strided=True)


def _repeatable(group: Group, engine: str) -> None:
    case, rank = _case(group, engine, dtype=torch.bfloat16, top_k=8), dist.get_rank(group)
    inputs = draw(case)
    runs = []
    with case.shuffle(group, engine) as shuffle:
        for _ in range(3):
            d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
            runs.append((d.tokens, shuffle.combine(inputs.outputs[rank], d)))
    for tokens, sums in runs[1:]:
        expect_same(tokens, runs[0][0], "tokens of a repeated dispatch")
        expect_same(sums, runs[0][1], "sums of a repeated combine")


def _bad_input(group: Group, engine: str) -> None:
    case, rank = _case(group, engine), dist.get_rank(group)
    inputs = draw(case)
    wrong = inputs.topk_idx[rank].clone()
    if rank == 0:
        wrong[0, 0] = case.num_experts
    with case.shuffle(group, engine) as shuffle:
        raised = None
        try:
            shuffle.dispatch(inputs.x[rank], wrong, inputs.weights_of(rank))
        except fusco.InputError as error:
            raised = str(error)
        expect_round_trip(shuffle, inputs, rank)
    expect(raised is not None, "an expert id out of range on rank 0 was accepted")
    expect("topk_idx" in str(raised), f"the error does not name the argument: {raised}")


def _several(group: Group, engine: str) -> None:
    case, rank = _case(group, engine), dist.get_rank(group)
    other = replace(case, hidden_size=96, dtype=torch.bfloat16, seed=1)
    inputs, inputs_other = draw(case), draw(other)
    with case.shuffle(group, engine) as one, other.shuffle(group, engine) as two:
        d = one.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
        d_other = two.dispatch(
            inputs_other.x[rank], inputs_other.topk_idx[rank], inputs_other.weights_of(rank)
        )
        y_other = two.combine(inputs_other.outputs[rank], d_other)
        y = one.combine(inputs.outputs[rank], d)
    expect_dispatched(d, inputs, rank)
    expect_dispatched(d_other, inputs_other, rank)
    expect_same(y, inputs.sums(rank), "combine of the first Shuffle")
    expect_same(y_other, inputs_other.sums(rank), "combine of the second Shuffle")


def _exchange(group: Group, engine: str) -> None:
    """Rank a sends b the bytes a, b, a, b, ... of (a + b) % 5 and 3, a segment each."""
    if engine == "cuda":
        raise NotApplicable("engine 'cuda' does not serve it")
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    peers, device = range(num_ranks), device_of(engine)
    source = torch.tensor([[rank, peer] * 4 for peer in peers], dtype=torch.uint8, device=device)
    out = torch.full((num_ranks, 8), 255, dtype=torch.uint8, device=device)

    def segments(first: int, other: int) -> fusco.Segments:
        return fusco.Segments(
            offset=torch.tensor([8 * other, 8 * other + 5]),
            size=torch.tensor([(first + other) % 5, 3]),
        )

    each = [segments(rank, peer) for peer in peers]
    fusco.exchange(source, each, out, each, group=group, engine=engine)
    want = torch.full((num_ranks, 8), 255, dtype=torch.uint8)
    for peer in peers:
        sent = torch.tensor([peer, rank] * 4, dtype=torch.uint8)
        for part in (slice((rank + peer) % 5), slice(5, 8)):
            want[peer, part] = sent[part]
    expect_same(out, want, "exchanged bytes")


CHECKS: tuple[Check, ...] = (
    Check(
        name="float32",
        description="rows, counts, offsets, weights and sums equal the dense answer",
        fn=_dtype(torch.float32),
    ),
    Check(name="bfloat16", description="the same in bfloat16", fn=_dtype(torch.bfloat16)),
    Check(name="float16", description="the same in float16", fn=_dtype(torch.float16)),
    Check(name="float64", description="the same in float64", fn=_dtype(torch.float64)),
    Check(name="bytes", description="rows of raw bytes, an odd number of them", fn=_bytes),
    Check(name="scaled-fp8", description="fp8 rows with their scales, as a tuple", fn=_scaled),
    Check(
        name="no-expert",
        description="id -1 is no expert, and a token with none gives zeros",
        fn=_routing("holes"),
    ),
    Check(
        name="repeated-expert",
        description="an expert chosen twice gets two rows",
        fn=_routing("repeated"),
    ),
    Check(name="one-expert", description="one expert takes all", fn=_routing("one-expert")),
    Check(name="nobody", description="no token has an expert", fn=_routing("nobody")),
    Check(name="empty-ranks", description="some ranks hold no token", fn=_empty_ranks),
    Check(name="no-weights", description="without weights, a plain sum", fn=_no_weights),
    Check(name="alignment", description="experts padded to 16 rows of zeros", fn=_alignment),
    Check(name="placement", description="experts dealt to the ranks in turn", fn=_placement),
    Check(name="two-nodes", description="a plan of two levels, if ranks halve", fn=_nodes),
    Check(name="plan-reuse", description="a plan serves other rows and weights", fn=_plan_reuse),
    Check(name="growth", description="windows grow for a larger load", fn=_growth),
    Check(
        name="inference",
        description="made and grown in torch's inference mode, and used outside",
        fn=_inference,
    ),
    Check(name="several", description="two Shuffles in turn on one group", fn=_several),
    Check(name="exchange", description="segments land where they belong", fn=_exchange),
    Check(name="repeatable", description="the same bits every time", fn=_repeatable),
    Check(name="gradients", description="of rows and weights, as of dense code", fn=_gradients),
    Check(name="strided", description="gradients through rows out of order", fn=_strided),
    Check(
        name="bad-input",
        description="a bad id raises on every rank, and the next call works",
        fn=_bad_input,
    ),
)
