"""The dense reference against answers worked out by hand: it judges everything else."""

from __future__ import annotations

import torch
from torch import tensor

from fusco.testing import dense

# Two ranks, experts 0 and 1 on rank 0, experts 2 and 3 on rank 1.
TOPK_IDX = (tensor([[2, 0], [1, -1], [3, 3]]), tensor([[0, 1], [-1, -1]]))
X = (tensor([[1.0], [2.0], [3.0]]), tensor([[4.0], [5.0]]))
WEIGHTS = (tensor([[0.5, 0.25], [0.75, 9.0], [0.1, 0.2]]), tensor([[0.3, 0.6], [9.0, 9.0]]))


def test_rows_are_sorted_by_expert_source_token_and_k() -> None:
    layout = dense.lay_out(TOPK_IDX, num_experts=4)
    assert dense.dispatch(layout, X, 0).flatten().tolist() == [1, 4, 2, 4]
    assert dense.dispatch(layout, X, 1).flatten().tolist() == [1, 3, 3]
    assert torch.equal(dense.row_weights(layout, WEIGHTS, 0), tensor([0.25, 0.3, 0.75, 0.6]))
    assert torch.equal(dense.row_weights(layout, WEIGHTS, 1), tensor([0.5, 0.1, 0.2]))
    assert layout.tokens_per_expert[0].tolist() == [2, 2]
    assert layout.expert_offsets[1].tolist() == [0, 1, 3]
    assert layout.slot_TK[0].tolist() == [[0, 0], [2, -1], [1, 2]]
    assert layout.rank_TK[0].tolist() == [[1, 0], [0, -1], [1, 1]]


def test_alignment_pads_every_expert_with_zeros() -> None:
    layout = dense.lay_out(TOPK_IDX, num_experts=4, expert_alignment=3)
    assert dense.dispatch(layout, X, 0).flatten().tolist() == [1, 4, 0, 2, 4, 0]
    assert dense.row_weights(layout, WEIGHTS, 1).tolist()[1:3] == [0, 0]
    assert layout.expert_offsets[0].tolist() == [0, 3, 6]
    assert layout.tokens_per_expert[0].tolist() == [2, 2]


def test_placement_keeps_local_experts_ascending() -> None:
    layout = dense.lay_out(TOPK_IDX, num_experts=4, placement=[1, 0, 1, 0])
    assert dense.dispatch(layout, X, 0).flatten().tolist() == [2, 4, 3, 3]
    assert dense.dispatch(layout, X, 1).flatten().tolist() == [1, 4, 1]


def test_no_expert_sums_to_zero_and_the_others_to_their_weighted_rows() -> None:
    layout = dense.lay_out(TOPK_IDX, num_experts=4)
    outputs = [tensor([[10.0], [20.0], [30.0], [40.0]]), tensor([[50.0], [60.0], [70.0]])]
    assert dense.combine(layout, outputs, 0).flatten().tolist() == [60, 30, 130]
    assert dense.combine(layout, outputs, 1).flatten().tolist() == [60, 0]
    weighted = dense.combine(layout, outputs, 0, WEIGHTS[0]).flatten()
    assert weighted[:2].tolist() == [0.25 * 10 + 0.5 * 50, 0.75 * 30]


def test_roundings_are_by_rank_then_node_then_source() -> None:
    # Four ranks of one expert each; bfloat16 near 256 has steps of 2, halves go to even.
    idx = (tensor([[0, 1, 2, 3]]), *(torch.empty((0, 4), dtype=torch.int64) for _ in range(3)))
    layout = dense.lay_out(idx, num_experts=4)
    outputs = [tensor([[v]], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0, 1.0)]
    one_node = dense.combine(layout, outputs, 0)
    two_nodes = dense.combine(layout, outputs, 0, node_of_rank=[0, 0, 1, 1])
    apart = dense.combine(layout, outputs, 0, node_of_rank=[0, 1, 1, 1])
    assert one_node.item() == 260  # 259, halfway between 258 and 260
    assert two_nodes.item() == 258  # 257 rounds to 256, then 256 + 2
    assert apart.item() == 260  # 256 + 3
    # On one rank, the sum is rounded once, after the last k.
    together = dense.lay_out((tensor([[0, 0, 0, 0]]), idx[1], idx[2], idx[3]), num_experts=4)
    rows = [torch.cat(outputs), *(outputs[0][:0] for _ in range(3))]
    assert dense.combine(together, rows, 0).item() == 260
