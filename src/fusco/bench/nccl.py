"""What fusco is compared with on GPUs: the same boundary by NCCL and the fastest permutes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.bench.baselines import expert_major, inverse
from fusco.bench.rows import RowMover
from fusco.bench.traffic import CountedAllToAll


@dataclass(frozen=True, kw_only=True)
class NcclDispatched:
    """What `NcclBaseline.dispatch` returns.

    Attributes:
        tokens: `[R, H]`, expert-major.
        row_weights: `[R]` fp32.
        tokens_per_expert: `[num_local_experts]` int64.
        slot_of_arrival: `[R]`, the expert-major row of each row in the order of arrival.
        return_TK: `[T, K]`, where each choice's row is among those that come back; below 0 where
            it chose no expert.
        topk_weights: `[T, K]`, of this rank's tokens.
        sent: rows sent to each rank.
        received: rows received from each rank.
    """

    tokens: Tensor
    row_weights: Tensor
    tokens_per_expert: Tensor
    slot_of_arrival: Tensor
    return_TK: Tensor
    topk_weights: Tensor
    sent: list[int]
    received: list[int]


class NcclBaseline:
    """Permute, `all_to_all_single`, permute; and the same back, with the weighted sum at the end.

    The host waits once, for the counts, as `all_to_all_single` wants them there; what does not
    need them is launched before.

    Args:
        num_experts: of the whole group, in equal contiguous blocks.
        group: sends CUDA tensors by NCCL.
        rows: what permutes.
    """

    def __init__(self, *, num_experts: int, group: dist.ProcessGroup, rows: RowMover) -> None:
        self._all_to_all = CountedAllToAll(group)
        self._rows = rows
        self._num_experts = num_experts
        self._num_ranks = group.size()

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank has sent to others so far."""
        return self._all_to_all.wire_bytes

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> NcclDispatched:
        """As `Shuffle.dispatch`, row by row in the same order."""
        # Few bits sort faster. Choices of no expert come first.
        chosen, choice_of_place = torch.sort(topk_idx.flatten().to(torch.int16), stable=True)
        experts = torch.arange(self._num_experts + 1, dtype=torch.int16, device=x.device)
        counts = torch.searchsorted(chosen, experts).diff()
        arriving = torch.empty_like(counts)
        self._all_to_all(arriving, counts)
        by_rank = torch.stack((counts, arriving)).view(2, self._num_ranks, -1)

        place_TK = inverse(choice_of_place, choice_of_place.numel()).view_as(topk_idx)
        leaving = self._rows.spread(x, choice_of_place, place_TK)
        weights = topk_weights.flatten()[choice_of_place]
        sent, received = by_rank.sum(dim=2).tolist()
        num_none, num_rows = topk_idx.numel() - sum(sent), sum(received)

        arrived = x.new_empty((num_rows, x.shape[1]))
        self._all_to_all(arrived, leaving[num_none:], received, sent)
        arrived_weights = topk_weights.new_empty(num_rows)
        self._all_to_all(arrived_weights, weights[num_none:], received, sent)
        arrival_of_slot = expert_major(by_rank[1], num_rows)
        return NcclDispatched(
            tokens=self._rows.gather(arrived, arrival_of_slot),
            row_weights=arrived_weights[arrival_of_slot],
            tokens_per_expert=by_rank[1].sum(dim=0),
            slot_of_arrival=inverse(arrival_of_slot, num_rows),
            return_TK=place_TK - num_none,
            topk_weights=topk_weights,
            sent=sent,
            received=received,
        )

    def combine(self, expert_outputs: Tensor, dispatched: NcclDispatched) -> Tensor:
        """As `Shuffle.combine`; terms are added in fp32 and rounded once."""
        d = dispatched
        leaving = self._rows.gather(expert_outputs, d.slot_of_arrival)
        returned = expert_outputs.new_empty((sum(d.sent), expert_outputs.shape[1]))
        self._all_to_all(returned, leaving, d.sent, d.received)
        return self._rows.weighted_sum(returned, d.return_TK, d.topk_weights)
