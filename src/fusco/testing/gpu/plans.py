"""Plans made on the device equal the planner's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch.distributed as dist

import fusco
from fusco.layout.compact import Links
from fusco.planner import plan_compact
from fusco.plans import CompactPlan, Plan, SegmentPlan
from fusco.testing.cases import device_of, draw, expect_same
from fusco.testing.check import Group
from fusco.testing.expand import expand_cluster
from fusco.testing.gpu.trips import random_case


def random_plans(seed: int, num_cases: int) -> Callable[[Group, str], None]:
    """A check of the plans of so many random cases.

    `planner.plan_compact`, to which a compact plan is compared, says the same as
    `planner.plan_cluster`; a test without a GPU holds them together.
    """

    def check(group: Group, engine: str) -> None:
        random = Random(seed)
        for _ in range(num_cases):
            case = random_case(random, dist.get_world_size(group), device_of(engine))
            rank, inputs = dist.get_rank(group), draw(case)
            with case.shuffle(group, engine) as shuffle:
                d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
                shuffle.synchronize()
                topology = shuffle.topology
            routing = (inputs.host or inputs).topk_idx
            want = plan_compact(
                routing,
                topology,
                max_tokens=max(1, *case.num_tokens),
                alignment=case.expert_alignment,
            )
            plan = Plan.from_tensors(d.plan.to_tensors())
            if isinstance(plan, CompactPlan):
                _expect_same_compact(plan, want[rank], topology.num_ranks)
            elif isinstance(plan, SegmentPlan):
                _expect_same_parts(plan, expand_cluster(want, topology)[rank])

    return check


def _expect_same_compact(got: CompactPlan, want: CompactPlan, num_ranks: int) -> None:
    expect_same(got.tokens_per_expert, want.tokens_per_expert, "tokens_per_expert")
    expect_same(got.expert_offsets, want.expert_offsets, "expert_offsets")
    expect_same(got.pairs[0], want.pairs[0], "ranks of pairs")
    expect_same(got.pairs[1], want.pairs[1], "slots of pairs")
    expect_same(got.row_extent, want.row_extent, "rows")
    one = Links.split(got.links.cpu(), got.num_tokens, num_ranks, got.top_k)
    other = Links.split(want.links, want.num_tokens, num_ranks, want.top_k)
    for name in ("sends", "arrivals", "rows", "return_at", "return_from", "token_segment"):
        expect_same(getattr(one, name), getattr(other, name), name)
    # Behind the segments that arrive nothing is written.
    for rank, count in enumerate(other.arrivals.tolist()):
        slots = one.arrival_slot[rank, :count], other.arrival_slot[rank, :count]
        expect_same(*slots, f"slots of what arrives from rank {rank}")


def _expect_same_parts(got: fusco.Plan, want: fusco.Plan) -> None:
    for one, other in zip(got.to_tensors()[1:], want.to_tensors()[1:], strict=True):
        expect_same(one, other, "a part of the plan")
