"""Dispatch on the CPU: plan, write into the peers' windows, wait for theirs, wrap what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery
from fusco.engines.cpu import plans
from fusco.engines.cpu.kernels.places import place_dispatch
from fusco.engines.cpu.kernels.scatter import scatter_rows, scatter_values, ship_slots
from fusco.engines.cpu.plans import ArrayPlan, LegArrays
from fusco.engines.cpu.session import Agreement, Session
from fusco.engines.cpu.unfused import expert_major, write_device_major
from fusco.engines.ids import bad_ids
from fusco.layout.blocks import Ints, Sections, dispatch_sizes
from fusco.layout.heap import NOTHING, Block, align
from fusco.layout.segments import bytes_per_row, from_segments
from fusco.profiling import stage


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
    row_bytes = [bytes_per_row(each) for each in rows]
    with stage("plan"):
        packed, low, high = plans.count(topk_idx, session.tables, world.topology.num_nodes)
        if low < -1 or high >= world.topology.num_experts:
            call = call._replace(error=bad_ids(low, high, world.topology.num_experts))
    with stage("agree"):
        block = NOTHING if call.error else session.window.reserve_largest()
        agreement = session.agree(call, block, packed)
    identity = new_identity()
    with stage("plan"):
        sends = plans.outline(topk_idx, agreement.payload, session.tables, world)
        agreement, start, at = _place(session, agreement, row_bytes, sends)
    leg = sends.leg
    with stage("write"):
        first = ship_slots(
            leg.peer_ptr, leg.slot_ptr, leg.slot, sends.segments, sends.pairs, rank, at
        )
        _write(session, rows, weights, leg, at, first)
    with stage("wait"):
        session.finish(agreement)
    with stage("plan"):
        lists = _slot_lists(session, agreement, start[-2:], sends)
        plan = plans.finish(identity, sends, *lists, rank)
    return _wrap(session, agreement.block, start, rows, weights, plan), sends.rows


def dispatch_planned(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    weights: Tensor | None,
    plan: ArrayPlan,
) -> Delivery:
    """Dispatch by an existing plan: every rank knows its need, and says how many rows it gets."""
    none = np.zeros(session.world.topology.num_ranks, dtype=np.int64)
    row_bytes = np.array([bytes_per_row(each) for each in rows])
    num_rows = np.array([plan.num_rows])
    own = Sections.stack(dispatch_sizes(row_bytes, num_rows, none[:1], none[:1]))
    with stage("agree"):
        call, block = session.reserve(call, int(own.total[0]))
        incoming = plan.incoming
        place = np.concatenate((num_rows, incoming.slot_ptr[incoming.peer_ptr[:-1]]))
        agreement = session.agree(call, block, place)
    sections = Sections.stack(dispatch_sizes(row_bytes, agreement.payload[:, 0], none, none))
    session.map(agreement.base + sections.total)
    at = sections.start + session.addresses + agreement.base
    with stage("write"):
        first = agreement.payload[:, 1 + session.rank]
        _write(session, rows, weights, plan.leg, at, first)
    with stage("wait"):
        session.finish(agreement)
    return _wrap(session, agreement.block, sections.start, rows, weights, plan)


def _place(
    session: Session, agreement: Agreement, row_bytes: Sequence[int], sends: plans.Outline
) -> tuple[Agreement, Ints, Ints]:
    """This rank's block cut to its need, where sections begin in each block, and where they are
    mapped here, int64 `[sections, P]`."""
    start, total, at, fits = place_dispatch(
        np.array(row_bytes),
        sends.rows,
        sends.segments,
        sends.pairs,
        agreement.base,
        agreement.capacity,
        session.addresses,
        session.sizes,
    )
    if fits:
        block = session.window.heap.shrink(agreement.block, int(total[session.rank]))
        return agreement.placed(block, agreement.base), start, at
    agreement = session.fit(agreement, total)
    session.map(agreement.base + total)
    return agreement, start, start + session.addresses + agreement.base


def _write(
    session: Session,
    rows: Sequence[Tensor],
    weights: Tensor | None,
    leg: LegArrays,
    at: Ints,
    first: Ints,
) -> None:
    """Send all rows and weights to their slots; sections in the order of `dispatch_sections`."""
    if weights is not None:
        dense = weights.contiguous()
        scatter_values(dense.data_ptr(), leg.pair, leg.slot, leg.target, at[len(rows)])
    if not session.world.ablation.fusion:
        write_device_major(rows, leg, session.world.top_k, at, first)
        return
    for each, base in zip(rows, at, strict=False):
        dense = each.contiguous()
        scatter_rows(
            dense.data_ptr(),
            bytes_per_row(dense),
            leg.slot_ptr,
            leg.slot,
            leg.target,
            leg.sum_segment,
            base,
        )


def _slot_lists(
    session: Session, agreement: Agreement, start: Ints, sends: plans.Outline
) -> tuple[Ints, Ints]:
    """Slots of each segment, and slots, as all ranks have written them into this rank's block.

    Args:
        start: `[2, P]`, where they begin in it.
    """
    rank, window, block = session.rank, session.window, agreement.block
    counts = int(sends.segments[:, rank].sum()), int(sends.pairs[:, rank].sum())
    segments_at, slots_at = start[:, rank].tolist()
    return (
        window.view(block, segments_at, counts[0], np.int64),
        window.view(block, slots_at, counts[1], np.int64),
    )


def _wrap(
    session: Session,
    block: Block,
    start: Ints,
    rows: Sequence[Tensor],
    weights: Tensor | None,
    plan: ArrayPlan,
) -> Delivery:
    """Rows become tensors where they lie; the rest of the block is free again."""
    window, num_rows = session.window, plan.num_rows
    *starts, weights_at = start[: len(rows) + 1, session.rank].tolist()
    fuses = session.world.ablation.fusion
    padding = None
    if session.world.alignment > 1:
        padding = torch.from_numpy(plan.row_segment < 0)
    got = []
    for like, begin in zip(rows, starts, strict=True):
        size = num_rows * bytes_per_row(like)
        segments = window.as_tensor(Block(base=block.base + begin, size=align(size)), size)
        if not fuses:
            segments = expert_major(segments.view(num_rows, -1), plan)
        segments = segments.view(num_rows, bytes_per_row(like))
        if fuses and padding is not None:
            segments[padding] = 0
        got.append(from_segments(segments, like))
    # Weights stay in the window too, beside rows that peers may read there in combine.
    size = num_rows * 4
    kept = Block(base=block.base + weights_at, size=align(size))
    row_weights = window.as_tensor(kept, size).view(torch.float32)
    if weights is None:
        row_weights.fill_(1)
    if padding is not None:
        row_weights[padding] = 0
    end = kept.base + kept.size
    window.heap.release(Block(base=end, size=block.base + block.size - end))
    return Delivery(rows=tuple(got), row_weights=row_weights, plan=plan)
