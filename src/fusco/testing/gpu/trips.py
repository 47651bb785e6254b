"""Round trips to the bit over random shapes, and over those where a kernel takes another path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fusco
from fusco.testing import dense
from fusco.testing.cases import (
    Case,
    device_of,
    draw,
    expect_dispatched,
    expect_same,
    sizes,
)
from fusco.testing.check import Group

_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
# Rows in units of 16 bytes: one, a few, odd, about a warp's, and more than a slot in shared memory.
_ROW_VECTORS = (1, 3, 32, 33, 65, 200, 1100)


def random_case(random: Random, num_ranks: int, device: str) -> Case:
    """A case of a group of that size, of any form that the CUDA engine takes."""
    dtype = random.choice(_DTYPES)
    payload: Any = random.choice(("float", "float", "float", "bytes", "scaled"))
    # Scales are fp32, one for 128 elements, and a multiple of 16 bytes too.
    vectors = random.choice(_ROW_VECTORS)
    hidden_size = 512 * random.randint(1, 3) if payload == "scaled" else vectors * 16
    if payload == "float":
        hidden_size //= dtype.itemsize
    num_experts = num_ranks * random.randint(1, 8)
    most_tokens = random.choice((1, 7, 40, 90))
    return Case(
        num_tokens=tuple(
            random.choice((0, random.randint(0, most_tokens), most_tokens))
            for _ in range(num_ranks)
        ),
        hidden_size=hidden_size,
        top_k=random.randint(1, 16),
        num_experts=num_experts,
        dtype=dtype,
        payload=payload,
        routing=random.choice(("uniform", "uniform", "repeated", "holes", "one-expert", "nobody")),
        weighted=random.random() < 0.7,
        placement=random.choice(
            (None, tuple(random.randrange(num_ranks) for _ in range(num_experts)))
        ),
        ranks_per_node=random.choice((None, None, random.randint(1, num_ranks))),
        expert_alignment=random.choice((1, 1, 2, 8, 128)),
        seed=random.randrange(1000),
        device=device,
    )


def expect_round_trips(case: Case, group: Group, engine: str, num_sms: int | None = None) -> None:
    """Two routings and a reused plan equal the dense answer; all calls come before comparisons."""
    rank = dist.get_rank(group)
    rounds = [draw(case), draw(case, 1)]
    rounds.append(draw(case, 2).routed_as(rounds[0]))
    dispatched: list[fusco.Dispatched[Any]] = []
    sums = []
    with case.shuffle(group, engine, num_sms=num_sms) as shuffle:
        for number, inputs in enumerate(rounds):
            x, weights = inputs.x[rank], inputs.weights_of(rank)
            if number == 2:
                d = shuffle.dispatch(x, topk_weights=weights, plan=dispatched[0].plan)
            else:
                d = shuffle.dispatch(x, inputs.topk_idx[rank], weights)
            dispatched.append(d)
            sums.append(shuffle.combine(inputs.outputs[rank], d))
        shuffle.synchronize()
    for inputs, d, y in zip(rounds, dispatched, sums, strict=True):
        expect_dispatched(d, inputs, rank)
        expect_same(y, inputs.sums(rank), f"combine of {case}")


def random_trips(seed: int, num_cases: int) -> Callable[[Group, str], None]:
    """A check of so many random cases."""

    def check(group: Group, engine: str) -> None:
        random = Random(seed)
        for _ in range(num_cases):
            case = random_case(random, dist.get_world_size(group), device_of(engine))
            expect_round_trips(case, group, engine)

    return check


def trips(num_sms: int | None = None, **changes: Any) -> Callable[[Group, str], None]:
    """A check of one case; `num_tokens` is repeated over the ranks, `num_experts` is a rank's."""

    def check(group: Group, engine: str) -> None:
        common: dict[str, Any] = {"num_tokens": (30, 0, 41), "num_experts": 4} | changes
        expect_round_trips(case_of(group, engine, **common), group, engine, num_sms=num_sms)

    return check


def case_of(
    group: Group, engine: str, *, num_tokens: Sequence[int], num_experts: int, **changes: Any
) -> Case:
    """A case of that group: `num_tokens` is repeated over the ranks, `num_experts` is a rank's."""
    return Case(
        num_tokens=sizes(num_tokens, group),
        num_experts=num_experts * dist.get_world_size(group),
        device=device_of(engine),
        **changes,
    )


def tuples(*widths: int) -> Callable[[Group, str], None]:
    """A check of fp32 tensors of these widths in one dispatch, and in one combine."""
    return partial(_expect_tuples, widths)


def _expect_tuples(widths: tuple[int, ...], group: Group, engine: str) -> None:
    rank = dist.get_rank(group)
    case = Case(
        num_tokens=sizes((25, 3, 0), group),
        hidden_size=sum(widths),
        top_k=5,
        num_experts=3 * dist.get_world_size(group),
        device=device_of(engine),
    )
    inputs = draw(case)
    host = inputs.host or inputs

    def parts(rows: Any) -> tuple[Tensor, ...]:
        return tuple(each.contiguous() for each in rows.split(widths, dim=1))

    with case.shuffle(group, engine) as shuffle:
        x = parts(inputs.x[rank])
        d = shuffle.dispatch(x, inputs.topk_idx[rank], inputs.weights_of(rank))
        y = shuffle.combine(parts(inputs.outputs[rank]), d)
        shuffle.synchronize()
    for part in range(len(widths)):
        rows = [parts(each)[part] for each in host.x]
        expect_same(d.tokens[part], dense.dispatch(host.layout, rows, rank), f"part {part}")
        outputs = [parts(each)[part] for each in host.outputs]
        want = dense.combine(
            host.layout, outputs, rank, host.weights_of(rank), node_of_rank=case.node_of_rank
        )
        expect_same(y[part], want, f"sums of part {part}")


def held_for_many_layers(group: Group, engine: str) -> None:
    """What many dispatches brought stays as it is while more arrive, and is combined later."""
    rank = dist.get_rank(group)
    case = Case(
        num_tokens=sizes((64, 20, 0), group),
        hidden_size=256,
        top_k=4,
        num_experts=2 * dist.get_world_size(group),
        dtype=torch.bfloat16,
        device=device_of(engine),
    )
    rounds = [draw(replace(case, seed=seed)) for seed in range(12)]
    with case.shuffle(group, engine) as shuffle:
        held = [
            shuffle.dispatch(each.x[rank], each.topk_idx[rank], each.weights_of(rank))
            for each in rounds
        ]
        sums = [
            shuffle.combine(each.outputs[rank], d) for each, d in zip(rounds, held, strict=True)
        ]
        shuffle.synchronize()
    for inputs, d, y in zip(rounds, held, sums, strict=True):
        expect_dispatched(d, inputs, rank)
        expect_same(y, inputs.sums(rank), "combine")
