"""What `engines/cuda/kernels/plan.cu` and the dispatch after it compute, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusco.layout.compact import Links
from fusco.planner.sorting import offsets
from fusco.plans import CompactPlan
from fusco.topology import Topology


def plan_compact(
    topk_idx: Sequence[Tensor], topology: Topology, *, max_tokens: int, alignment: int = 1
) -> list[CompactPlan]:
    """Compact plans of all ranks, as they are when a dispatch has run.

    Args:
        topk_idx: for each rank int64 `[T, K]`; T may differ, K may not.
        topology: as seen from any rank.
        max_tokens: the most tokens a rank dispatches; no T is larger.
        alignment: every expert's rows are padded to a multiple of it.

    Returns:
        one a rank, with the plan's number left 0.
    """
    num_ranks, num_experts, top_k = topology.num_ranks, topology.num_experts, topk_idx[0].shape[1]
    facts = topology.tensors(topk_idx[0].device)
    # The last entry answers for id -1.
    owner_of = torch.cat((facts.rank_of_expert, facts.rank_of_expert.new_tensor([-1])))
    owner = [owner_of[idx] for idx in topk_idx]
    goes = [_goes_to(each, num_ranks) for each in owner]
    sends = torch.stack([each.sum(dim=0) for each in goes])
    per_expert = torch.stack(
        [torch.bincount(idx.flatten() + 1, minlength=num_experts + 1)[1:] for idx in topk_idx]
    )
    total = per_expert.sum(dim=0)
    padded = torch.div(total + (alignment - 1), alignment, rounding_mode="floor") * alignment
    starts = offsets(padded[facts.device_major])
    rank_starts = starts[facts.first_expert]
    start = torch.empty_like(total)
    start[facts.device_major] = (
        starts[:-1] - rank_starts[:-1][facts.rank_of_expert[facts.device_major]]
    )
    before = per_expert.cumsum(0) - per_expert
    slot = [_slots(idx, start + before[rank], num_experts) for rank, idx in enumerate(topk_idx)]
    segment = [(each.cumsum(0) - 1).masked_fill(~each, -1) for each in goes]
    rows = rank_starts.diff()

    plans = []
    for me in range(num_ranks):
        others = sends.clone().fill_diagonal_(0)
        arrival_slot = slot[me].new_full((num_ranks, max_tokens, top_k), -1)
        for source in range(num_ranks):
            arrival_slot[source, : int(sends[source, me])] = _slot_lists(
                slot[source], owner[source] == me, goes[source][:, me]
            )
        links = Links(
            number=sends.new_ones(1),
            sends=sends[me],
            arrivals=sends[:, me],
            rows=rows,
            return_at=others[:, :me].sum(dim=1),
            return_from=others[me].cumsum(0) - others[me],
            token_segment=segment[me],
            arrival_slot=arrival_slot,
        )
        local = facts.device_major[facts.first_expert[me] : facts.first_expert[me + 1]]
        plans.append(
            CompactPlan(
                identity=torch.zeros(2, dtype=torch.int64),
                tokens_per_expert=total[local],
                expert_offsets=torch.cat((start[local], rows[me : me + 1])).to(torch.int32),
                pairs=torch.stack((owner[me], slot[me])).to(torch.int32),
                links=links.join().to(torch.int32),
                row_extent=torch.zeros(1, dtype=torch.uint8).expand(int(rows[me])),
            )
        )
    return plans


def _goes_to(owner: Tensor, num_ranks: int) -> Tensor:
    """bool `[T, P]`: whether a token has an expert on each rank."""
    ranks = torch.arange(num_ranks, device=owner.device)
    return (owner[:, :, None] == ranks).any(dim=1)


def _slots(topk_idx: Tensor, first: Tensor, num_experts: int) -> Tensor:
    """int64 `[T, K]`: a rank's pairs of an expert follow one another from slot `first[expert]`."""
    flat = topk_idx.flatten()
    key = flat.masked_fill(flat < 0, num_experts)
    order = torch.argsort(key, stable=True)[: int((flat >= 0).sum())]
    counts = torch.bincount(key, minlength=num_experts + 1)[:-1]
    index = torch.arange(order.shape[0], device=flat.device) - offsets(counts)[flat[order]]
    slot = torch.full_like(flat, -1)
    slot[order] = first[flat[order]] + index
    return slot.view_as(topk_idx)


def _slot_lists(slot: Tensor, is_mine: Tensor, has_any: Tensor) -> Tensor:
    """int64 `[n, K]`: of each token that goes to a rank its slots there, k ascending, then -1."""
    order = torch.argsort((~is_mine).to(torch.int8), dim=1, stable=True)
    return slot.masked_fill(~is_mine, -1).gather(1, order)[has_any]
