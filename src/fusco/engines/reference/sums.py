"""The sum of the contract in plain torch: multiply, then add, and round where DESIGN says."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def partial_sums(rows: Tensor, weights: Tensor | None, slot_ptr: Tensor, slot: Tensor) -> Tensor:
    """A rank's partial of every segment: its rows, k ascending, rounded once.

    Args:
        rows: floating `[R, H]`.
        weights: float32 `[R]` or None.
        slot_ptr: int64 `[n + 1]`.
        slot: int64 `[m]`, k ascending within a segment.

    Returns:
        `[n, H]` in the dtype of `rows`.
    """
    per_segment = slot_ptr.diff()
    dtype = accumulator_dtype(rows.dtype)
    sums = torch.zeros(per_segment.shape[0], rows.shape[1], dtype=dtype, device=rows.device)
    most = int(per_segment.max()) if per_segment.numel() else 0
    for k in range(most):
        has = torch.nonzero(per_segment > k)[:, 0]
        chosen = slot[slot_ptr[has] + k]
        term = rows[chosen].to(dtype)
        if weights is not None:
            term = term * weights[chosen].to(dtype)[:, None]
        sums[has] += term
    return sums.to(rows.dtype)


def node_sums(partials: Tensor, sum_segment: Tensor, sum_node: Tensor) -> Tensor:
    """Each row's partials, summed within nodes in rank order, rounded, and over nodes.

    Args:
        partials: floating `[n, H]`.
        sum_segment: int64 `[rows, K]`, indices into `partials` in (node, rank) order; -1: none.
        sum_node: int64 `[rows, K]`, the node of each.

    Returns:
        `[rows, H]` in the dtype of `partials`.
    """
    dtype = accumulator_dtype(partials.dtype)
    shape = (sum_segment.shape[0], partials.shape[1])
    total = torch.zeros(shape, dtype=dtype, device=partials.device)
    node = torch.zeros_like(total)
    for k in range(sum_segment.shape[1]):
        if k:
            ended = torch.nonzero(sum_node[:, k] != sum_node[:, k - 1])[:, 0]
            total[ended] += node[ended].to(partials.dtype).to(dtype)
            node[ended] = 0
        has = torch.nonzero(sum_segment[:, k] >= 0)[:, 0]
        node[has] += partials[sum_segment[has, k]].to(dtype)
    total += node.to(partials.dtype).to(dtype)
    return total.to(partials.dtype)
