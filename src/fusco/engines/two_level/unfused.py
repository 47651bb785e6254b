"""What fusion saves between nodes: the same rows moved stage by stage, permuted before and after
(for the ablation of FUSCO, section 5.4).

Every stage handles all rows before the next begins: rows are copied into the order in which they
leave, cross whole, are copied into the order in which they go on, and where they end are copied
into the order that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusco.engines.node import NodeBlocks
from fusco.engines.two_level.session import Session
from fusco.layout.segments import as_segments, bytes_per_row, from_segments
from fusco.planner import offsets
from fusco.plans import SlicedPlan


def pairs_to_node(plan: SlicedPlan, num_ranks: int) -> Tensor:
    """int64 `[P]` on the CPU: how many rows, one for each pair, this rank hands to each rank of its
    node."""
    target = torch.cat((plan.near.target, plan.received.target))
    return torch.bincount(target, minlength=num_ranks).cpu()


def dispatch_whole(
    session: Session,
    operation: str,
    blocks: NodeBlocks,
    rows: Sequence[Tensor],
    plan: SlicedPlan,
    handed: Tensor,
) -> list[Tensor]:
    """Bring all rows to their experts' ranks, and there into their slots.

    Args:
        session: of the engine.
        operation: what to call it in errors.
        blocks: of this node; section i has room for the rows of tensor i.
        rows: tensors `[T, ...]`.
        plan: whole.
        handed: int64 `[P, P]`, what `pairs_to_node` says on each rank of the node; rows of other
            ranks are not looked at.

    Returns:
        tensors uint8 `[R, bytes]`, 0 where a row is padding.
    """
    topology, near, received = session.world.topology, plan.near, plan.received
    own_rows = torch.div(near.pair, plan.top_k, rounding_mode="floor")
    num_received = received.slot_ptr.shape[0] - 1
    row_of_pair = torch.repeat_interleave(
        torch.arange(num_received, device=own_rows.device), received.slot_ptr.diff()
    )
    relayed_rows = row_of_pair[plan.relay_pair]
    # Pairs are sorted by the rank that they are handed to.
    to_rank = [
        torch.bincount(target, minlength=topology.num_ranks).tolist()
        for target in (near.target, received.target)
    ]
    arrival = _order_of_arrival(plan)
    before = [mate for mate in session.node.ranks if mate < topology.rank]
    first = handed[before].sum(dim=0).tolist()
    got = []
    for section, each in enumerate(rows):
        parts = as_segments(each)
        there = _cross(session, operation, parts, plan)
        own, relayed = parts.index_select(0, own_rows), there.index_select(0, relayed_rows)
        for mate, *pieces in zip(
            range(topology.num_ranks), own.split(to_rank[0]), relayed.split(to_rank[1]), strict=True
        ):
            begin = first[mate]
            for piece in pieces:
                if piece.shape[0]:
                    blocks.put(section, mate, begin, piece)
                begin += piece.shape[0]
        got.append(parts.new_zeros(plan.num_rows, parts.shape[1]))
    blocks.finish()
    for section, slots in enumerate(got):
        arrived = blocks.view(section, slots)[: arrival.shape[0]]
        slots.index_copy_(0, arrival, arrived)
    return got


def combine_whole(
    session: Session,
    operation: str,
    blocks: NodeBlocks,
    rows: Sequence[Tensor],
    row_weights: Tensor | None,
    plan: SlicedPlan,
) -> list[Tensor]:
    """The sums of all tokens `[T, ...]`; the arguments are as in `dispatch_whole`, but for rows
    `[R, ...]` and their weights, float32 `[R]`."""
    node, partials = session.node, plan.partials
    arrival = _order_of_arrival(plan)
    place = arrival.new_empty(plan.num_rows)
    place[arrival] = torch.arange(arrival.shape[0], device=arrival.device)
    weights = None if row_weights is None else row_weights[arrival]
    for section, each in enumerate(rows):
        blocks.push_sums(
            section,
            each.index_select(0, arrival),
            weights,
            partials.slot_ptr,
            place[partials.slot],
            partials.target,
            partials.place,
        )
    blocks.reach(0)
    blocks.wait(0)
    list_ptr, item = _sums_of_tokens(plan)
    sums = []
    for section, each in enumerate(rows):
        held = each.new_empty(plan.held_ptr.shape[0] - 1, *each.shape[1:])
        node.sum_rows(blocks.view(section, each), None, plan.held_ptr, plan.held, held)
        size = plan.far.row.shape[0], bytes_per_row(each)
        returned = torch.empty(size, dtype=torch.uint8, device="cpu")
        leaving = as_segments(held[plan.num_tokens :]).cpu()
        session.mailbox.swap(
            leaving.split(plan.received.peer_ptr.diff().tolist()),
            returned.split(plan.far.peer_ptr.diff().tolist()),
            operation=operation,
        )
        arrived = from_segments(returned.to(each.device), each)
        terms = torch.cat((arrived, held[: plan.num_tokens])).index_select(0, item)
        out = each.new_empty(plan.num_tokens, *each.shape[1:])
        each_term = torch.arange(item.shape[0], device=item.device)
        node.sum_rows(terms, None, list_ptr, each_term, out)
        sums.append(out)
    return sums


def _cross(session: Session, operation: str, rows: Tensor, plan: SlicedPlan) -> Tensor:
    """Rows of forwarding descriptors to their forwarders: what has come from all nodes."""
    leaving = rows.index_select(0, plan.far.row).cpu()
    num_received = plan.received.slot_ptr.shape[0] - 1
    there = torch.empty(num_received, rows.shape[1], dtype=rows.dtype, device="cpu")
    session.mailbox.swap(
        leaving.split(plan.far.peer_ptr.diff().tolist()),
        there.split(plan.received.peer_ptr.diff().tolist()),
        operation=operation,
    )
    return there.to(rows.device)


def _order_of_arrival(plan: SlicedPlan) -> Tensor:
    """int64 `[m]`: the slots of this rank's rows, sorted by who hands them over, and then as that
    rank does: its own tokens before those it relays."""
    partials = plan.partials
    target = torch.repeat_interleave(partials.target, partials.slot_ptr.diff())
    order = torch.argsort(partials.pair_place)
    order = order[torch.argsort(target[order], stable=True)]
    return partials.slot[order]


def _sums_of_tokens(plan: SlicedPlan) -> tuple[Tensor, Tensor]:
    """As `final_ptr` and `final` of a plan, but rows are those of the forwarding descriptors, and
    behind them the own node's sum of each token."""
    num_near, segment = plan.near.row.shape[0], plan.near.sum_segment
    is_far = segment >= num_near
    is_near = (segment >= 0) & ~is_far
    is_listed = is_far | (is_near & (is_near.cumsum(dim=1) == 1))
    own = plan.far.row.shape[0] + torch.arange(plan.num_tokens, device=segment.device)
    item = torch.where(is_far, segment - num_near, own[:, None])
    return offsets(is_listed.sum(dim=1)), item[is_listed]
