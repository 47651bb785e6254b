"""What fusco is compared with: the same boundary in plain torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fusco.bench.traffic import CountedAllToAll


@dataclass(frozen=True, kw_only=True)
class BaselineDispatched:
    """What `AllToAllBaseline.dispatch` returns; if it keeps buffers, valid until its next call.

    Attributes:
        tokens: `[R, H]`, expert-major.
        row_weights: `[R]` fp32.
        tokens_per_expert: `[num_local_experts]` int64.
        slot_of_arrival: `[R]`, the expert-major row of each row in the order of arrival.
        choice_of_sent: `[S]`, the flat (token, k) of each row this rank sent.
        topk_weights: `[T, K]`, of this rank's tokens.
        sent: rows sent to each rank.
        received: rows received from each rank.
    """

    tokens: Tensor
    row_weights: Tensor
    tokens_per_expert: Tensor
    slot_of_arrival: Tensor
    choice_of_sent: Tensor
    topk_weights: Tensor
    sent: list[int]
    received: list[int]


class AllToAllBaseline:
    """Permute, `all_to_all_single`, permute; and the same back, over a gloo group.

    It permutes as fast as torch can: by `index_select`, and the last permutation and the weighted
    sum are one `embedding_bag`, in fp32. 16-bit rows want 16-bit weights there, so these are split
    in two terms that together hold 16 bits of fraction or more.

    Args:
        num_experts: of the whole group, in equal contiguous blocks.
        group: a gloo group.
        keep_buffers: large tensors are kept from call to call, results too, which the next call
            overwrites. Otherwise they are allocated as torch code does, and then a large part of
            the time goes into fresh pages.
    """

    def __init__(
        self, *, num_experts: int, group: dist.ProcessGroup, keep_buffers: bool = False
    ) -> None:
        self._all_to_all = CountedAllToAll(group)
        self._keep_buffers = keep_buffers
        self._num_experts = num_experts
        self._num_ranks = dist.get_world_size(group)
        self._buffers: dict[str, Tensor] = {}

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank has sent to others so far."""
        return self._all_to_all.wire_bytes

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> BaselineDispatched:
        """As `Shuffle.dispatch`, expert by expert in the same order."""
        num_none = int((topk_idx < 0).sum())
        choice_of_sent = torch.sort(topk_idx.flatten(), stable=True).indices[num_none:]
        chosen = topk_idx.flatten()[choice_of_sent]
        sent_counts = torch.bincount(chosen, minlength=self._num_experts)
        received_counts = torch.empty_like(sent_counts)
        self._all_to_all(received_counts, sent_counts)
        sent = sent_counts.view(self._num_ranks, -1).sum(1).tolist()
        received_counts = received_counts.view(self._num_ranks, -1)
        received = received_counts.sum(1).tolist()

        rows = self._buffer("leaving", sum(sent), x)
        torch.index_select(x, 0, choice_of_sent // topk_idx.shape[1], out=rows)
        arrived = self._buffer("arrived", sum(received), x)
        self._all_to_all(arrived, rows, received, sent)
        weights = topk_weights.new_empty(sum(received))
        self._all_to_all(weights, topk_weights.flatten()[choice_of_sent], received, sent)

        arrival_of_slot = expert_major(received_counts, sum(received))
        tokens = self._buffer("tokens", sum(received), x)
        torch.index_select(arrived, 0, arrival_of_slot, out=tokens)
        return BaselineDispatched(
            tokens=tokens,
            row_weights=weights[arrival_of_slot],
            tokens_per_expert=received_counts.sum(0),
            slot_of_arrival=inverse(arrival_of_slot, arrival_of_slot.numel()),
            choice_of_sent=choice_of_sent,
            topk_weights=topk_weights,
            sent=sent,
            received=received,
        )

    def combine(self, expert_outputs: Tensor, dispatched: BaselineDispatched) -> Tensor:
        """As `Shuffle.combine`; terms are added in fp32 and rounded once."""
        d = dispatched
        rows = self._buffer("arrived", sum(d.received), expert_outputs)
        torch.index_select(expert_outputs, 0, d.slot_of_arrival, out=rows)
        # One row more, of zeros, is what a choice of no expert adds.
        returned = self._buffer("returned", sum(d.sent) + 1, expert_outputs)
        returned[-1] = 0
        self._all_to_all(returned[:-1], rows, d.sent, d.received)
        return_of_choice = inverse(d.choice_of_sent, d.topk_weights.numel())
        return _weighted_sum(returned, return_of_choice.view_as(d.topk_weights), d.topk_weights)

    def _buffer(self, name: str, num_rows: int, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < num_rows:
            buffer = like.new_empty((num_rows, *like.shape[1:]))
        if self._keep_buffers:
            self._buffers[name] = buffer
        return buffer[:num_rows]


def expert_major(counts: Tensor, num_rows: int) -> Tensor:
    """The arrival of each expert-major row `[R]`, from the counts `[ranks, local experts]`.

    Rows arrive sorted by source rank, then expert. The host knows R, `num_rows`, already.
    """
    ends = counts.flatten().cumsum(0).view_as(counts)
    lengths = counts.t().flatten()
    begins_in_order = lengths.cumsum(0) - lengths
    shift = (ends - counts).t().flatten() - begins_in_order
    arrivals = torch.repeat_interleave(shift, lengths, output_size=num_rows)
    return arrivals + torch.arange(num_rows, device=counts.device)


def inverse(permutation: Tensor, size: int) -> Tensor:
    """Where each of `size` things went; what went nowhere gets the number of those that did."""
    places = permutation.new_full((size,), permutation.numel())
    places[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return places


def _weighted_sum(rows: Tensor, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
    high_TK = weight_TK.to(rows.dtype)
    if rows.element_size() > 2:
        return F.embedding_bag(row_TK, rows, per_sample_weights=high_TK, mode="sum")
    low_TK = (weight_TK - high_TK).to(rows.dtype)
    return F.embedding_bag(
        torch.cat((row_TK, row_TK), dim=1),
        rows,
        per_sample_weights=torch.cat((high_TK, low_TK), dim=1),
        mode="sum",
    )
