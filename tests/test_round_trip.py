"""Any dispatch and combine, on every engine, to the bit: drawn here, run on ranks of the pool."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import ENGINES
from fusco.testing.cases import Case, draw, expect, expect_dispatched, expect_same
from fusco.testing.ranks import RankPool, subgroup

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_ranks = draw(st.integers(1, 8))
    num_nodes = draw(st.integers(1, min(4, num_ranks)))
    num_experts = num_ranks * draw(st.integers(1, 5))
    rank = st.integers(0, num_ranks - 1)
    placements = st.lists(rank, min_size=num_experts, max_size=num_experts).map(tuple)
    most_tokens = draw(st.sampled_from((3, 30, 150)))
    tokens = st.integers(0, most_tokens)
    return Case(
        num_tokens=tuple(draw(st.lists(tokens, min_size=num_ranks, max_size=num_ranks))),
        hidden_size=draw(st.sampled_from((1, 7, 32, 129, 600))),
        top_k=draw(st.integers(1, 16)),
        num_experts=num_experts,
        dtype=draw(st.sampled_from(DTYPES)),
        payload=draw(st.sampled_from(("float", "float", "float", "bytes", "scaled"))),
        routing=draw(st.sampled_from(("uniform", "repeated", "holes", "one-expert", "nobody"))),
        weighted=draw(st.booleans()),
        placement=draw(st.none() | placements),
        # Rounded up: the last node may have fewer ranks than the others.
        ranks_per_node=draw(st.sampled_from((None, -(-num_ranks // num_nodes)))),
        expert_alignment=draw(st.sampled_from((1, 1, 2, 8, 128))),
        seed=draw(st.integers(0, 99)),
    )


def round_trips(rank: int, case: Case, first_rank: int, max_delay_s: float) -> None:
    """On every engine: two routings and a reused plan; all calls before any comparison."""
    group = subgroup(range(first_rank, first_rank + case.num_ranks))
    if group is None:
        return
    rank -= first_rank
    delays = random.Random(rank)
    rounds = [draw(case), draw(case, 1), draw(case, 2)]
    rounds[2] = replace(
        rounds[2],
        topk_idx=rounds[0].topk_idx,
        layout=rounds[0].layout,
        outputs=rounds[0].outputs,
    )
    sums_of = {}
    for engine in ENGINES:
        dispatched, sums = [], []
        with case.shuffle(group, engine) as shuffle:
            for number, inputs in enumerate(rounds):
                time.sleep(delays.random() * max_delay_s)
                reused = {"plan": dispatched[0].plan} if number == 2 else {}
                idx = None if reused else inputs.topk_idx[rank]
                weights = inputs.weights_of(rank)
                dispatched.append(shuffle.dispatch(inputs.x[rank], idx, weights, **reused))
                time.sleep(delays.random() * max_delay_s)
                sums.append(shuffle.combine(inputs.outputs[rank], dispatched[-1]))
        sums_of[engine] = sums
        for number, inputs in enumerate(rounds):
            expect_dispatched(dispatched[number], inputs, rank)
            expect_same(sums[number], inputs.sums(rank), f"{engine}, round {number}, combine")
    # Compared as bytes, where the sign of a zero counts too.
    for first, *others in zip(*sums_of.values(), strict=True):
        bits = first.contiguous().view(torch.uint8)
        for other in others:
            same = torch.equal(bits, other.contiguous().view(torch.uint8))
            expect(same, "the engines' sums differ in the sign of a zero")


LARGE = Case(
    num_tokens=(300, 0, 211, 17),
    hidden_size=2048,
    top_k=8,
    num_experts=32,
    dtype=torch.bfloat16,
    routing="uniform",
    expert_alignment=16,
)


@given(case=cases(), offset=st.booleans(), max_delay_s=st.sampled_from((0.0, 0.0, 0.02)))
@example(case=LARGE, offset=True, max_delay_s=0.0)
@example(case=replace(LARGE, ranks_per_node=2, routing="holes"), offset=False, max_delay_s=0.02)
@example(
    case=Case(num_tokens=(400,), hidden_size=7001, top_k=2, num_experts=3),
    offset=False,
    max_delay_s=0.0,
)
@example(
    case=Case(
        num_tokens=(40, 40, 0, 40, 1, 40, 40, 333),
        top_k=16,
        num_experts=8,
        ranks_per_node=2,
        routing="one-expert",
    ),
    offset=False,
    max_delay_s=0.0,
)
def test_forward_equals_dense(pool: RankPool, case: Case, offset: bool, max_delay_s: float) -> None:
    first_rank = pool.num_ranks - case.num_ranks if offset else 0
    pool.run(round_trips, case, first_rank, max_delay_s)
