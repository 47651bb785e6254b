"""Dispatch on the CPU: plan, write into the peers' windows, wait for theirs, wrap what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery
from fusco.engines.cpu import plans
from fusco.engines.cpu.kernels.scatter import scatter_rows, scatter_values, ship_slots
from fusco.engines.cpu.session import Agreement, Session
from fusco.engines.cpu.unfused import expert_major, first_rows, write_device_major
from fusco.layout.blocks import Ints, Sections, dispatch_sections
from fusco.layout.heap import Block, align
from fusco.layout.segments import as_segments, bytes_per_row, from_segments
from fusco.profiling import stage
from fusco.types import Leg, SegmentPlan


def dispatch_new(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    weights: Tensor | None,
    topk_idx: Tensor,
    new_identity: Callable[[], Tensor],
) -> tuple[Delivery, Ints]:
    """Plan and dispatch; also the rows that each rank receives, int64 `[P]`.

    A block is reserved and published before its need is known; the counts of all ranks, which
    come with the same records, say what each rank needs.
    """
    world, rank = session.world, session.rank
    with stage("plan"):
        packed = plans.count(topk_idx, world)
    with stage("agree"):
        block = session.window.reserve_largest()
        agreement = session.agree(call, block, packed)
    identity = new_identity()
    with stage("plan"):
        sends = plans.outline(topk_idx, agreement.payload, world)
    sections = dispatch_sections(
        sends.rows,
        [bytes_per_row(each) for each in rows],
        sends.segments.sum(axis=0),
        sends.pairs.sum(axis=0),
    )
    agreement = session.fit(agreement, sections.total)
    at = _addresses(session, agreement, sections)
    with stage("write"):
        leg, first = sends.leg, sends.pairs[:rank].sum(axis=0)
        ship_slots(
            leg.peer_ptr.numpy(),
            leg.slot_ptr.numpy(),
            leg.slot.numpy(),
            at[-2] + sends.segments[:rank].sum(axis=0) * 8,
            at[-1] + first * 8,
        )
        _write(session, rows, weights, leg, at, first)
    with stage("wait"):
        session.finish(agreement)
    with stage("plan"):
        lists = _slot_lists(session, agreement, sections, sends)
        plan = plans.finish(identity, sends, *lists, rank)
    return _wrap(session, agreement, sections, rows, weights, plan), sends.rows


def dispatch_planned(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    weights: Tensor | None,
    plan: SegmentPlan,
) -> Delivery:
    """Dispatch by an existing plan: every rank knows its need, and says how many rows it gets."""
    none = np.zeros(session.world.topology.num_ranks, dtype=np.int64)
    row_bytes = [bytes_per_row(each) for each in rows]
    own = dispatch_sections(np.array([plan.num_rows]), row_bytes, none[:1], none[:1])
    with stage("agree"):
        call, block = session.reserve(call, int(own.total[0]))
        place = np.concatenate(([plan.num_rows], first_rows(plan.arrival)))
        agreement = session.agree(call, block, place)
    sections = dispatch_sections(agreement.payload[:, 0], row_bytes, none, none)
    at = _addresses(session, agreement, sections)
    with stage("write"):
        first = agreement.payload[:, 1 + session.rank]
        _write(session, rows, weights, plan.send, at, first)
    with stage("wait"):
        session.finish(agreement)
    return _wrap(session, agreement, sections, rows, weights, plan)


def _addresses(session: Session, agreement: Agreement, sections: Sections) -> Ints:
    """int64 `[sections, P]`: where each section of each rank's block is mapped here."""
    base = agreement.base
    return sections.start + session.addresses(base + sections.total) + base


def _write(
    session: Session,
    rows: Sequence[Tensor],
    weights: Tensor | None,
    leg: Leg,
    at: Ints,
    first: Ints,
) -> None:
    """Send all rows and weights to their slots; sections in the order of `dispatch_sections`."""
    slot_ptr, slot, target = leg.slot_ptr.numpy(), leg.slot.numpy(), leg.target.numpy()
    if weights is not None:
        dense = weights.contiguous()
        scatter_values(dense.data_ptr(), leg.pair.numpy(), slot, target, at[len(rows)])
    if not session.world.ablation.fusion:
        write_device_major(rows, leg, session.world.top_k, at, first)
        return
    sum_segment = leg.sum_segment.numpy()
    for each, base in zip(rows, at, strict=False):
        segments = as_segments(each)
        scatter_rows(
            segments.data_ptr(), segments.shape[1], slot_ptr, slot, target, sum_segment, base
        )


def _slot_lists(
    session: Session, agreement: Agreement, sections: Sections, sends: plans.Outline
) -> tuple[Ints, Ints]:
    """Slots of each segment, and slots, as all ranks have written them into this rank's block."""
    rank, window = session.rank, session.window
    starts = sections.start[-2:, rank].tolist()
    counts = int(sends.segments[:, rank].sum()), int(sends.pairs[:, rank].sum())
    segments, slots = (
        window.view(agreement.block, start, count, np.int64)
        for start, count in zip(starts, counts, strict=True)
    )
    return segments, slots


def _wrap(
    session: Session,
    agreement: Agreement,
    sections: Sections,
    rows: Sequence[Tensor],
    weights: Tensor | None,
    plan: SegmentPlan,
) -> Delivery:
    """Rows become tensors where they lie; the rest of the block is free again."""
    window, block, start = session.window, agreement.block, sections.start[:, session.rank]
    padding = plan.row_segment < 0 if session.world.alignment > 1 else None
    end = block.base

    def lying(begin: int, row_bytes: int) -> Tensor:
        nonlocal end
        part = Block(base=block.base + begin, size=align(plan.num_rows * row_bytes))
        end = part.base + part.size
        segments = window.as_tensor(part, plan.num_rows * row_bytes)
        return segments.view(plan.num_rows, row_bytes)

    got = []
    for like, begin in zip(rows, start.tolist(), strict=False):
        segments = lying(begin, bytes_per_row(like))
        if not session.world.ablation.fusion:
            segments = expert_major(
                segments[: plan.arrival.slot.shape[0]], plan.arrival, plan.num_rows
            )
        elif padding is not None:
            segments[padding] = 0
        got.append(from_segments(segments, like))
    # Weights stay in the window too, beside rows that peers may read there in combine.
    row_weights = lying(int(start[len(rows)]), 4).view(torch.float32)[:, 0]
    if weights is None:
        row_weights.fill_(1)
    if padding is not None:
        row_weights[padding] = 0
    window.heap.release(Block(base=end, size=block.base + block.size - end))
    return Delivery(rows=tuple(got), row_weights=row_weights, plan=plan)
