"""The physical floor: what merely moving the bytes takes, with all ranks moving at once.

On CPUs all ranks share the memory, and their copies add up. Every GPU has memory and links of its
own, which work at the same time, so there the busiest of them is the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def floor_ms(num_tokens: float, num_rows: float, row_bytes: int, gbps: float) -> float:
    """The least time of a dispatch, and of a combine, in memory that all ranks share.

    A dispatch must read each token once and write each expert-major row once; a combine must read
    each row once and write each token once. Nothing else is counted: no plan, no weights, no
    counts, no line that the cache reads because it is about to be written.

    Args:
        num_tokens: tokens with their rows, of all ranks.
        num_rows: expert-major rows, of all ranks.
        row_bytes: bytes of a row.
        gbps: from `meters.copy_gbps`, measured in the same run.
    """
    return (num_tokens + num_rows) * row_bytes / gbps / 1e6


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one routing of one rank moves, in rows; arrays `[P]` are by receiving rank.

    Attributes:
        num_tokens: tokens of the rank.
        num_sources: of them, those with an expert.
        segments: of them, those with an expert there: each crosses the link once.
        spread: of these, those with more than one expert there.
        rows: rows that arrive there.
    """

    num_tokens: int
    num_sources: int
    segments: NDArray[np.int64]
    spread: NDArray[np.int64]
    rows: NDArray[np.int64]


def count_load(topk_idx: Tensor, rank_of_expert: Sequence[int], num_ranks: int) -> Load:
    """The load of one rank's `topk_idx` `[T, K]`."""
    # One column more is for the choices of no expert, whose -1 finds the last entry.
    ranks = torch.tensor([*rank_of_expert, num_ranks])
    rank_TK = ranks[topk_idx.cpu()]
    rows_TP = torch.zeros((len(topk_idx), num_ranks + 1), dtype=torch.int64)
    rows_TP.scatter_add_(1, rank_TK, torch.ones_like(rank_TK))
    rows_TP = rows_TP[:, :num_ranks]
    return Load(
        num_tokens=len(topk_idx),
        num_sources=int((rows_TP > 0).any(dim=1).sum()),
        segments=(rows_TP > 0).sum(dim=0).numpy(),
        spread=(rows_TP > 1).sum(dim=0).numpy(),
        rows=rows_TP.sum(dim=0).numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of an operation: `ms`, and what the links and the memory need of it."""

    ms: float
    link_ms: float
    memory_ms: float

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            ms=self.ms + other.ms,
            link_ms=self.link_ms + other.link_ms,
            memory_ms=self.memory_ms + other.memory_ms,
        )


def gpu_floors(
    loads: Sequence[Load], row_bytes: int, link_gbps: float, memory_gbps: float
) -> dict[str, Floor]:
    """The floor of each operation where every rank has a GPU, from the loads of all ranks.

    A link carries one row a (token, remote rank) either way. For a dispatch memory reads each
    token, takes in all rows, and reads again those that came over the link and belong to more
    than one expert. For a combine it reads all rows, takes in and reads the partial sums that
    other ranks return, and takes in the sums. The gradient of a dispatch is a combine; that of a
    combine is a dispatch which also reads the rows, for the gradient of the weights.
    """
    remote_PP = _remote([load.segments for load in loads])
    spread_P = _remote([load.spread for load in loads]).sum(axis=0)
    rows_P = np.stack([load.rows for load in loads]).sum(axis=0)
    sources_P = np.array([load.num_sources for load in loads])
    tokens_P = np.array([load.num_tokens for load in loads])
    crossing = max(remote_PP.sum(axis=0).max(), remote_PP.sum(axis=1).max())
    returned_P = remote_PP.sum(axis=1)

    def floor(rows_in_memory: NDArray[np.int64]) -> Floor:
        link_ms = float(crossing * row_bytes / link_gbps / 1e6)
        memory_ms = float(rows_in_memory.max() * row_bytes / memory_gbps / 1e6)
        return Floor(ms=max(link_ms, memory_ms), link_ms=link_ms, memory_ms=memory_ms)

    dispatch_P = sources_P + rows_P + spread_P
    dispatch = floor(dispatch_P)
    combine = floor(rows_P + 2 * returned_P + tokens_P)
    total = dispatch + combine
    return {
        "dispatch": dispatch,
        "combine": combine,
        "total": total,
        "forward_backward": total + combine + floor(dispatch_P + rows_P),
    }


def mean_floors(floors: Sequence[dict[str, Floor]]) -> dict[str, Floor]:
    """Of several routings that are measured in rotation."""
    return {
        op: Floor(
            ms=float(np.mean([each[op].ms for each in floors])),
            link_ms=float(np.mean([each[op].link_ms for each in floors])),
            memory_ms=float(np.mean([each[op].memory_ms for each in floors])),
        )
        for op in floors[0]
    }


def _remote(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """By sender and receiver, without what a rank keeps."""
    rows_PP = np.stack(rows)
    np.fill_diagonal(rows_PP, 0)
    return rows_PP
