"""The checks of a machine with GPUs, beside those of `fusco selftest`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

import fusco
from fusco.engines.cuda.peers import try_link
from fusco.testing.cases import Case, device_of, draw, expect, expect_round_trip, sizes
from fusco.testing.check import Check, Group, NotApplicable
from fusco.testing.compiled import expect_compiled
from fusco.testing.gpu.again import again, again_wrong
from fusco.testing.gpu.order import (
    claims,
    closed,
    dropped_rows,
    late_errors,
    one_combine_too_many,
    other_streams,
    taking_turns,
    two_at_once,
)
from fusco.testing.gpu.plans import random_plans
from fusco.testing.gpu.static import (
    graphs,
    graphs_beside,
    graphs_memory,
    graphs_overflow,
    overflow,
    static_rows,
)
from fusco.testing.gpu.trips import case_of, held_for_many_layers, random_trips, trips, tuples
from fusco.testing.gradients import expect_gradients, expect_weighed
from fusco.testing.mistakes import (
    CASE,
    CUDA_MISTAKES,
    MISTAKES,
    Mistake,
    expect_mistake,
    make_mistake,
)
from fusco.testing.ranks import subgroup

_NUM_SEEDS = 4


def _gradients(
    expect_all: Callable[[Case, Group, str], None] = expect_gradients, **changes: Any
) -> Callable[[Group, str], None]:
    def check(group: Group, engine: str) -> None:
        common: dict[str, Any] = {
            "num_tokens": (9, 0, 20, 3),
            "num_experts": 2,
            "hidden_size": 6,
            "top_k": 4,
            "dtype": torch.float64,
        }
        expect_all(case_of(group, engine, **common | changes), group, engine)

    return check


def _weighed(**changes: Any) -> Callable[[Group, str], None]:
    return _gradients(expect_weighed, num_experts=4, **changes)


def _mistakes(mistakes: Mapping[str, Mistake]) -> Callable[[Group, str], None]:
    """Only on a group of as many ranks as the mistakes are made by."""

    def check(group: Group, engine: str) -> None:
        if dist.get_world_size(group) != len(CASE.num_tokens):
            raise NotApplicable(f"{len(CASE.num_tokens)} ranks make these mistakes")
        failures = []
        for name, mistake in mistakes.items():
            outcome = make_mistake(mistake, group, engine)
            try:
                expect_mistake(mistake, outcome, dist.get_rank(group))
            except AssertionError as failure:
                failures.append(f"{name}: {failure}")
        expect(not failures, "; ".join(failures))

    return check


def _nccl_group(group: Group, engine: str) -> None:
    """A group that has only NCCL meets through its store, and gets its engine by itself.

    The runner has made it, for which ranks outside were needed too.
    """
    num_ranks = dist.get_world_size(group)
    if device_of(engine) != "cuda" or num_ranks > torch.cuda.device_count():
        raise NotApplicable("needs a GPU a rank, and an engine for them")
    alone = subgroup(range(num_ranks), backend="nccl")
    case = Case(
        num_tokens=sizes((30, 0, 41), group),
        num_experts=4 * num_ranks,
        dtype=torch.bfloat16,
        device=device_of(engine),
    )
    with case.shuffle(alone, "auto") as shuffle:
        expect_round_trip(shuffle, draw(case), dist.get_rank(group))
        expect(shuffle.engine_name == engine, f"engine {shuffle.engine_name}")


def _links(group: Group, engine: str) -> None:
    """What `fusco doctor` tries, from the GPU of each rank to the next one."""
    source, num_gpus = torch.cuda.current_device(), torch.cuda.device_count()
    target = (source + 1) % num_gpus
    if num_gpus < 2 or not torch.cuda.can_device_access_peer(source, target):
        raise NotApplicable("needs two GPUs, with peer access")
    link = try_link(source, target)
    expect(not link.problem, link.problem)


def _size_hint(group: Group, engine: str) -> None:
    """What one rank takes that receives everything is what was predicted."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    case = Case(
        num_tokens=(200,) * num_ranks,
        hidden_size=1024,
        top_k=4,
        num_experts=2 * num_ranks,
        routing="one-expert",
        expert_alignment=16,
        device=device_of(engine),
    )
    hint = fusco.buffer_size_hint(
        num_ranks=num_ranks,
        num_experts=case.num_experts,
        hidden_size=case.hidden_size,
        top_k=case.top_k,
        max_tokens=200,
        dtype=case.dtype,
        num_alive=3,
        imbalance=num_ranks,
        expert_alignment=16,
    )
    inputs = draw(case)
    with case.shuffle(group, engine) as shuffle:
        held = [shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank]) for _ in range(3)]
        used = shuffle.stats().window_bytes
        shuffle.combine(held[0].tokens, held[0])
        shuffle.synchronize()
    if engine == "cuda":
        told = f"{used} bytes are used, {hint} was predicted"
        expect(hint.total_bytes // 2 <= used <= hint.total_bytes, told)


GPU_CHECKS: tuple[Check, ...] = (
    *(
        Check(
            name=f"random-{seed}",
            description="random shapes, payloads, routings and placements",
            fn=random_trips(seed, 6),
        )
        for seed in range(_NUM_SEEDS)
    ),
    *(
        Check(
            name=f"plans-{seed}",
            description="plans equal the planner's, bit for bit",
            fn=random_plans(100 + seed, 10),
        )
        for seed in range(_NUM_SEEDS)
    ),
    Check(
        name="wide-rows",
        description="rows wider than a warp's slot in shared memory",
        fn=trips(hidden_size=7168, dtype=torch.float32, num_tokens=(9, 4), top_k=3),
    ),
    Check(
        name="cut-rows-few-sms",
        description="rows in pieces, of which few multiprocessors take several at a time",
        fn=trips(
            num_sms=2, hidden_size=7168, dtype=torch.bfloat16, num_tokens=(30, 0, 41), top_k=8
        ),
    ),
    Check(
        name="model-rows",
        description="rows of a large model, top-8",
        fn=trips(
            hidden_size=7168, dtype=torch.bfloat16, num_tokens=(40, 64), top_k=8, num_experts=8
        ),
    ),
    Check(
        name="batches",
        description="rows in pieces, of which all multiprocessors take several at a time",
        fn=trips(
            hidden_size=3600,
            dtype=torch.bfloat16,
            num_tokens=(1200, 80, 0, 0, 0, 0, 0, 0),
            top_k=4,
        ),
    ),
    Check(
        name="many-tokens",
        description="more tokens than the planning kernel has blocks for at first",
        fn=trips(hidden_size=4, num_tokens=(9001, 100), top_k=2),
    ),
    Check(
        name="many-experts",
        description="more experts than threads of a block",
        fn=trips(hidden_size=8, num_experts=700, num_tokens=(300, 17), top_k=6),
    ),
    Check(name="top-16", description="the widest top-k", fn=trips(top_k=16, num_experts=16)),
    Check(
        name="nodes-of-one",
        description="every rank a node of its own in the order of sums",
        fn=trips(ranks_per_node=1, dtype=torch.bfloat16, top_k=7),
    ),
    Check(name="size-hint", description="windows are as large as predicted", fn=_size_hint),
    Check(
        name="nccl-group",
        description="a group of NCCL alone gets this engine by itself (a GPU a rank)",
        fn=_nccl_group,
    ),
    Check(
        name="links",
        description="kernels that write and read the memory of another GPU (two GPUs)",
        fn=_links,
        only="cuda",
    ),
    Check(
        name="again",
        description="calls that come again alike, some of which differ in how tensors lie",
        fn=again(),
    ),
    Check(
        name="again-wide",
        description="the same with rows of a large model, top-8, and padding",
        fn=again(hidden_size=7168, top_k=8, expert_alignment=16),
    ),
    Check(
        name="again-one-rank",
        description="the same where only the last rank receives rows",
        fn=again(routing="one-expert", dtype=torch.float32),
    ),
    Check(
        name="again-nobody",
        description="the same where no token has an expert",
        fn=again(routing="nobody", dtype=torch.float16),
    ),
    Check(
        name="again-wrong",
        description="errors of calls that come again alike",
        fn=again_wrong,
    ),
    Check(name="tuple-of-four", description="four tensors at once", fn=tuples(4, 48, 12, 32)),
    Check(
        name="tuple-wide-narrow",
        description="tensors of which one comes in pieces",
        fn=tuples(3584, 112),
    ),
    Check(
        name="held", description="rows of many dispatches stay as they are", fn=held_for_many_layers
    ),
    Check(
        name="backward-model",
        description="gradients of outputs and weights with rows of a large model, top-8",
        fn=_weighed(hidden_size=7168, dtype=torch.bfloat16, num_tokens=(40, 0, 64), top_k=8),
    ),
    Check(
        name="backward-wide",
        description="gradients of rows wider than a warp's slot in shared memory",
        fn=_weighed(hidden_size=7168, dtype=torch.float32, num_tokens=(9, 4), top_k=3),
    ),
    Check(
        name="backward-half",
        description="gradients of short rows in half precision, with padding",
        fn=_weighed(
            hidden_size=24, dtype=torch.float16, routing="repeated", expert_alignment=4, top_k=4
        ),
    ),
    Check(
        name="gradients-repeated",
        description="gradients with repeated experts and padding",
        fn=_gradients(routing="repeated", expert_alignment=4),
    ),
    Check(
        name="gradients-holes",
        description="gradients with tokens without experts",
        fn=_gradients(routing="holes", ranks_per_node=1),
    ),
    Check(
        name="gradients-one-rank",
        description="gradients where only the last rank receives rows",
        fn=_gradients(routing="one-expert", num_tokens=(5, 0, 0, 2)),
    ),
    Check(
        name="gradients-nobody",
        description="gradients where no token has an expert",
        fn=_gradients(routing="nobody"),
    ),
    Check(
        name="gradients-unweighted",
        description="gradients of plain sums",
        fn=_gradients(weighted=False),
    ),
    Check(
        name="compiled",
        description="a layer that torch.compile takes as one graph",
        fn=_gradients(expect_compiled),
    ),
    Check(
        name="static-rows",
        description="outputs of fixed size, without a wait",
        fn=static_rows,
        only="cuda",
    ),
    Check(
        name="graphs",
        description="a CUDA graph replayed with other routing",
        fn=graphs,
        only="cuda",
    ),
    Check(
        name="graphs-beside",
        description="a CUDA graph of calls on two streams",
        fn=graphs_beside,
        only="cuda",
    ),
    Check(
        name="graphs-memory",
        description="graphs of one Shuffle that hold results",
        fn=graphs_memory,
        only="cuda",
    ),
    Check(name="overflow", description="more rows than max_recv_tokens", fn=overflow, only="cuda"),
    Check(
        name="graphs-overflow",
        description="replays that overflow leave experts nothing to do",
        fn=graphs_overflow,
        only="cuda",
    ),
    Check(
        name="late-errors",
        description="what a combine finds is raised by all ranks in the same call",
        fn=late_errors,
        only="cuda",
    ),
    Check(
        name="one-combine-too-many",
        description="ranks whose calls are of other kinds raise without waiting for each other",
        fn=one_combine_too_many,
        only="cuda",
    ),
    Check(
        name="claims",
        description="room for side streams that one rank does not have",
        fn=claims,
        only="cuda",
    ),
    Check(
        name="closed",
        description="windows go when a Shuffle is closed",
        fn=closed,
        only="cuda",
    ),
    Check(
        name="two-at-once",
        description="two shuffles on side streams at once",
        fn=two_at_once,
        only="cuda",
    ),
    Check(
        name="taking-turns",
        description="two shuffles that do not fit on a GPU together, on streams of their own",
        fn=taking_turns,
        only="cuda",
    ),
    Check(
        name="dropped-rows",
        description="rows that a stream still reads when they are dropped on it",
        fn=dropped_rows,
    ),
    Check(
        name="other-streams",
        description="changing streams and current devices",
        fn=other_streams,
        only="cuda",
    ),
    Check(
        name="mistakes",
        description="wrong calls raise on all ranks, and the next call works (3 ranks)",
        fn=_mistakes(MISTAKES),
    ),
    Check(
        name="gpu-mistakes",
        description="wrong calls that only this engine knows (3 ranks)",
        fn=_mistakes(CUDA_MISTAKES),
        only="cuda",
    ),
)
