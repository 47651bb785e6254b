"""Dispatch on GPUs: reserve a block, plan and move in two kernels, learn how many rows came."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int32, c_uint64
from typing import Any

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery
from fusco.engines.cuda.jit import Variant
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.kernels.structs import MAX_PARTS, Verdict
from fusco.engines.cuda.session import MAX_PLAN_BLOCKS, Session
from fusco.engines.cuda.window import Place
from fusco.layout.compact import links_len, part_starts
from fusco.layout.segments import bytes_per_row
from fusco.types import CompactPlan

_PLAN_THREADS = 512
_TOKENS_PER_PLAN_BLOCK = 64
_MAX_WARPS = 14
_MAX_SLOT_BYTES = 16384


def dispatch_new(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    weights: Tensor | None,
    topk_idx: Tensor,
    new_identity: Callable[[], Tensor],
) -> Delivery:
    """Plan and dispatch. Only when all ranks have counted is it known who needs how much room;
    where it is not there, all ranks add some and begin again."""
    job = _Job(session, rows, weights)
    device, num_tokens, top_k = session.device, *topk_idx.shape
    num_local = session.constants.num_local
    pairs = torch.empty((2, num_tokens, top_k), dtype=torch.int32, device=device)
    size = links_len(num_tokens, session.num_ranks, session.max_tokens, top_k)
    links = torch.empty(size, dtype=torch.int32, device=device)
    tokens_per_expert = torch.empty(num_local, dtype=torch.int64, device=device)
    expert_offsets = torch.empty(num_local + 1, dtype=torch.int32, device=device)
    while True:
        place = session.heap.reserve_largest()
        ticket = session.describe(call, place)
        job.launch_plan(topk_idx.contiguous(), pairs, links, tokens_per_expert, expert_offsets)
        job.launch(pairs, links, tokens_per_expert, expert_offsets)
        report = session.await_report(ticket, call)
        if report.verdict == Verdict.GO:
            break
        session.heap.release(place)
        session.raise_failure()
        session.grow(call.operation.text, report.need)
    got, row_weights = job.wrap(place, report.num_rows)
    plan = CompactPlan(
        identity=new_identity(),
        tokens_per_expert=tokens_per_expert,
        expert_offsets=expert_offsets,
        pairs=pairs,
        links=links,
        row_extent=tokens_per_expert.view(torch.uint8)[:1].expand(report.num_rows),
    )
    return Delivery(rows=got, row_weights=row_weights, plan=plan)


def dispatch_planned(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    weights: Tensor | None,
    plan: CompactPlan,
) -> Delivery:
    """Dispatch by an existing plan."""
    job = _Job(session, rows, weights)
    need = part_starts(job.row_bytes, plan.num_rows)[-1]
    while True:
        place = session.heap.reserve(need)
        ticket = session.describe(call, place)
        job.launch(
            plan.pairs, plan.links, plan.tokens_per_expert, plan.expert_offsets, is_planned=True
        )
        report = session.await_report(ticket, call)
        if report.verdict == Verdict.GO:
            break
        session.heap.release(place)
        session.raise_failure()
        session.grow(call.operation.text, report.need)
    got, row_weights = job.wrap(place, plan.num_rows)
    return Delivery(rows=got, row_weights=row_weights, plan=plan)


class _Job:
    """The tensors of one dispatch."""

    def __init__(self, session: Session, rows: tuple[Tensor, ...], weights: Tensor | None) -> None:
        self.session = session
        self.rows = [each.contiguous() for each in rows]
        self.weights = None if weights is None else weights.contiguous()
        self.row_bytes = [bytes_per_row(each) for each in rows]
        self.num_tokens = rows[0].shape[0]

    def launch_plan(
        self,
        topk_idx: Tensor,
        pairs: Tensor,
        links: Tensor,
        tokens_per_expert: Tensor,
        expert_offsets: Tensor,
    ) -> None:
        session, num_tokens = self.session, self.num_tokens
        chunk = max(_TOKENS_PER_PLAN_BLOCK, -(-num_tokens // MAX_PLAN_BLOCKS))
        num_counts = session.world.topology.num_experts + session.num_ranks
        shared_bytes = 4 * (2 * num_counts + 1 + chunk * session.world.top_k)
        arguments = structs.PlanArgs(
            topk_idx=topk_idx.data_ptr(),
            pairs=pairs.data_ptr(),
            links=links.data_ptr(),
            tokens_per_expert=tokens_per_expert.data_ptr(),
            expert_offsets=expert_offsets.data_ptr(),
            row_bytes=_padded(self.row_bytes),
            num_parts=len(self.row_bytes),
            num_tokens=num_tokens,
            chunk_tokens=chunk,
        )
        session.launcher(Variant(name="plan"), session.max_shared_bytes)(
            session.stream,
            max(1, -(-num_tokens // chunk)),
            _PLAN_THREADS,
            shared_bytes,
            session.constants,
            session.call,
            arguments,
        )

    def launch(
        self,
        pairs: Tensor,
        links: Tensor,
        tokens_per_expert: Tensor,
        expert_offsets: Tensor,
        is_planned: bool = False,
    ) -> None:
        session = self.session
        slot_bytes = min(_MAX_SLOT_BYTES, max(self.row_bytes))
        # Beside a warp's slot lie its barrier and, once a block, the places of all ranks.
        places = session.num_ranks * (MAX_PARTS + 2) * 8
        room = session.max_shared_bytes - places
        num_warps = min(_MAX_WARPS, room // (slot_bytes + 8)) // 2 * 2
        arguments = structs.DispatchArgs(
            rows=_padded([each.data_ptr() for each in self.rows], c_uint64),
            weights=0 if self.weights is None else self.weights.data_ptr(),
            pairs=pairs.data_ptr(),
            links=links.data_ptr(),
            tokens_per_expert=tokens_per_expert.data_ptr(),
            expert_offsets=expert_offsets.data_ptr(),
            row_bytes=_padded(self.row_bytes),
            num_parts=len(self.row_bytes),
            num_tokens=self.num_tokens,
            slot_bytes=slot_bytes,
            is_planned=is_planned,
        )
        session.launcher(Variant(name="dispatch"), session.max_shared_bytes)(
            session.stream,
            session.num_sms,
            num_warps * 32,
            num_warps * (slot_bytes + 8) + places,
            session.constants,
            session.call,
            arguments,
        )

    def wrap(self, place: Place, num_rows: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The rows and their weights where they lie; the rest of the block is free again."""
        heap = self.session.heap
        starts = part_starts(self.row_bytes, num_rows)
        place = heap.shrink(place, starts[-1])
        sizes = [
            (start, (num_rows, *each.shape[1:]), each.dtype)
            for start, each in zip(starts, self.rows, strict=False)
        ]
        tensors = heap.as_tensors(place, [*sizes, (starts[-2], (num_rows,), torch.float32)])
        return tuple(tensors[:-1]), tensors[-1]


def _padded(values: list[int], kind: Any = c_int32) -> Any:
    return (kind * MAX_PARTS)(*values)
