"""What the planners of one and two levels share: the order of pairs, and sums of counts."""

from __future__ import annotations

import numpy as np

from fusco.engines.cpu.kernels.compiling import inner
from fusco.layout.blocks import Ints


@inner
def sort_by_rank(
    topk_idx: Ints, token: int, rank_of_expert: Ints, order_of_rank: Ints, by_rank: Ints
) -> int:
    """The choices k of a token that name an expert, by the position of its rank, then k: as many of
    the first of `by_rank`, `[K]`, as are returned."""
    count = 0
    for k in range(by_rank.size):
        expert = topk_idx[token, k]
        if expert < 0:
            continue
        order = order_of_rank[rank_of_expert[expert]]
        place = count
        while place > 0 and (
            order_of_rank[rank_of_expert[topk_idx[token, by_rank[place - 1]]]] > order
        ):
            by_rank[place] = by_rank[place - 1]
            place -= 1
        by_rank[place] = k
        count += 1
    return count


@inner
def offsets(counts: Ints) -> Ints:
    """`planner.offsets`."""
    result = np.zeros(counts.size + 1, dtype=np.int64)
    for i in range(counts.size):
        result[i + 1] = result[i] + counts[i]
    return result
