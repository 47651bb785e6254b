"""The contract of dispatch and combine in plain loops, in one process that sees every rank.

Nothing here is shared with planner or engines. Lists are by source or receiving rank of the group.
Suffixes: T tokens of a source rank, K choices of a token, R rows of a receiving rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """The `k`-th choice of token `token` of rank `source`."""

    source: int
    token: int
    k: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where every choice lands.

    Attributes:
        rank_TK: by source, int64 `[T, K]`: the rank of the chosen expert, -1 for no expert.
        slot_TK: by source, int64 `[T, K]`: the row on that rank, -1 for no expert.
        choices: by receiving rank, what each of its R rows holds; None for a padding row.
        tokens_per_expert: by receiving rank, int64 `[num_local_experts]`, padding not counted.
        expert_offsets: by receiving rank, int32 `[num_local_experts + 1]`, padding counted.
    """

    rank_TK: tuple[Tensor, ...]
    slot_TK: tuple[Tensor, ...]
    choices: tuple[tuple[Choice | None, ...], ...]
    tokens_per_expert: tuple[Tensor, ...]
    expert_offsets: tuple[Tensor, ...]


def lay_out(
    topk_idx: Sequence[Tensor],
    *,
    num_experts: int,
    placement: Sequence[int] | None = None,
    expert_alignment: int = 1,
) -> Layout:
    """Expert-major order: local expert ascending in id, then source rank, token, k.

    Args:
        topk_idx: by source, integers `[T, K]`, -1 for no expert.
        num_experts: experts of the whole group.
        placement: the rank of each expert; None is equal contiguous blocks.
        expert_alignment: each expert's rows are padded to a multiple of it.
    """
    num_ranks = len(topk_idx)
    if placement is None:
        block = num_experts // num_ranks
        placement = [expert // block for expert in range(num_experts)]
    chosen: dict[int, list[Choice]] = {expert: [] for expert in range(num_experts)}
    for source, idx_TK in enumerate(topk_idx):
        for token, experts in enumerate(idx_TK.tolist()):
            for k, expert in enumerate(experts):
                if expert >= 0:
                    chosen[expert].append(Choice(source=source, token=token, k=k))

    rank_TK = [torch.full(idx_TK.shape, -1).numpy() for idx_TK in topk_idx]
    slot_TK = [torch.full(idx_TK.shape, -1).numpy() for idx_TK in topk_idx]
    choices: list[tuple[Choice | None, ...]] = []
    tokens_per_expert, expert_offsets = [], []
    for rank in range(num_ranks):
        rows: list[Choice | None] = []
        counts, offsets = [], [0]
        for expert in range(num_experts):
            if placement[expert] != rank:
                continue
            for choice in chosen[expert]:
                rank_TK[choice.source][choice.token, choice.k] = rank
                slot_TK[choice.source][choice.token, choice.k] = len(rows)
                rows.append(choice)
            while len(rows) % expert_alignment:
                rows.append(None)
            counts.append(len(chosen[expert]))
            offsets.append(len(rows))
        choices.append(tuple(rows))
        tokens_per_expert.append(torch.tensor(counts, dtype=torch.int64))
        expert_offsets.append(torch.tensor(offsets, dtype=torch.int32))
    return Layout(
        rank_TK=tuple(torch.from_numpy(ranks) for ranks in rank_TK),
        slot_TK=tuple(torch.from_numpy(slots) for slots in slot_TK),
        choices=tuple(choices),
        tokens_per_expert=tuple(tokens_per_expert),
        expert_offsets=tuple(expert_offsets),
    )


def dispatch(layout: Layout, x: Sequence[Tensor], rank: int) -> Tensor:
    """The rows `[R, ...]` of one receiving rank, of any dtype; padding rows are zero.

    Args:
        layout: where every choice lands.
        x: by source, `[T, ...]`, all of one dtype and row shape.
        rank: the receiving rank.
    """
    row_shape = x[0].shape[1:]
    zero = x[0].new_zeros(row_shape)
    rows = [x[c.source][c.token] if c else zero for c in layout.choices[rank]]
    return torch.stack(rows) if rows else x[0].new_empty((0, *row_shape))


def row_weights(layout: Layout, topk_weights: Sequence[Tensor], rank: int) -> Tensor:
    """The router weight `[R]` of each row of one receiving rank; 0 on padding."""
    zero = topk_weights[0].new_zeros(())
    rows = [topk_weights[c.source][c.token, c.k] if c else zero for c in layout.choices[rank]]
    return torch.stack(rows) if rows else topk_weights[0].new_empty(0)


def combine(
    layout: Layout,
    outputs: Sequence[Tensor],
    source: int,
    topk_weights: Tensor | None = None,
    *,
    node_of_rank: Sequence[int] | None = None,
) -> Tensor:
    """The sums `[T, H]` of one source rank, with every rounding where the contract has it.

    A rank's partial: multiply, then add, k ascending, in fp32 (fp64 for fp64), rounded to the
    dtype. A node's partials: added in that precision in rank order, and rounded. The nodes' sums:
    the same again. No term is a fused multiply-add. Differentiable.

    Args:
        layout: where every choice landed.
        outputs: by receiving rank, the expert outputs `[R, H]`.
        source: the rank whose tokens are summed.
        topk_weights: the source's weights `[T, K]`; None is a plain sum.
        node_of_rank: the node of each rank; None is one node.
    """
    rank_TK, slot_TK = layout.rank_TK[source], layout.slot_TK[source]
    num_tokens, top_k = slot_TK.shape
    dtype, hidden = outputs[0].dtype, outputs[0].shape[1:]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    node_of_rank = node_of_rank or [0] * len(outputs)

    total = torch.zeros((num_tokens, *hidden), dtype=wide)
    for node in sorted(set(node_of_rank)):
        node_sum = torch.zeros((num_tokens, *hidden), dtype=wide)
        for rank in range(len(outputs)):
            if node_of_rank[rank] != node:
                continue
            partial = torch.zeros((num_tokens, *hidden), dtype=wide)
            for k in range(top_k):
                tokens = (rank_TK[:, k] == rank).nonzero().flatten()
                terms = outputs[rank][slot_TK[tokens, k]].to(wide)
                if topk_weights is not None:
                    weights = topk_weights[tokens, k].to(wide)
                    terms = terms * weights.reshape(-1, *(1 for _ in hidden))
                partial = partial.index_put((tokens,), partial[tokens] + terms)
            node_sum = node_sum + partial.to(dtype).to(wide)
        total = total + node_sum.to(dtype).to(wide)
    return total.to(dtype)
