"""Measures dispatch and combine with the routing that the demo's model has just produced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fusco.bench import BenchConfig, Measurement, RoutingSet, run_bench
from fusco.demo.ranks import RankRouting
from fusco.testing.ranks import RankPool

MODEL_PATTERN = "this model"
FLAT_PATTERNS = ("uniform", "zipf")
NODE_PATTERNS = ("single-node", "imbalanced")
"""Patterns that speak of nodes: for them the ranks are taken as two nodes."""
HIDDEN_SIZE = 2048
"""Rows as wide as a model's in use; the demo's own are too short to time."""
NUM_ITERATIONS = 10


def measure(
    pool: RankPool,
    routings: Sequence[RankRouting],
    num_experts: int,
    on_pattern: Callable[[str], None],
) -> list[Measurement]:
    """Dispatch, combine and total of fusco and of the baseline, pattern by pattern.

    Args:
        pool: where to measure.
        routings: by rank, what the model's routers decided.
        num_experts: of the model.
        on_pattern: told each pattern before it is measured.
    """
    recorded = RoutingSet(
        topk_idx=np.stack([routing.topk_idx.numpy() for routing in routings], axis=1),
        topk_weights=np.stack([routing.topk_weights.numpy() for routing in routings], axis=1),
    )
    _, _, num_tokens, top_k = recorded.topk_idx.shape
    measurements = []
    for pattern in (MODEL_PATTERN, *FLAT_PATTERNS, *NODE_PATTERNS):
        on_pattern(pattern)
        config = BenchConfig(
            num_ranks=pool.num_ranks,
            num_tokens=num_tokens,
            hidden_size=HIDDEN_SIZE,
            top_k=top_k,
            num_experts=num_experts,
            pattern=pattern,
            ranks_per_node=pool.num_ranks // 2 if pattern in NODE_PATTERNS else None,
            iterations=NUM_ITERATIONS,
        )
        measurements += run_bench(config, pool, recorded if pattern == MODEL_PATTERN else None)
    return measurements
