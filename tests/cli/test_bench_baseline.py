"""The baseline does the whole work: its results are the dense answer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fusco.bench.baselines import AllToAllBaseline
from fusco.testing import dense
from fusco.testing.ranks import RankPool

HIDDEN, TOP_K, NUM_EXPERTS = 24, 3, 16


def round_trips(rank: int, dtype: torch.dtype, keep_buffers: bool, term_error: float) -> None:
    """Two round trips, the second larger, each against the dense answer."""
    world = dist.group.WORLD
    assert world is not None
    baseline = AllToAllBaseline(num_experts=NUM_EXPERTS, group=world, keep_buffers=keep_buffers)
    generator = torch.Generator().manual_seed(1)
    for num_tokens in (7, 40):
        everyone = range(dist.get_world_size())
        x = [torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype) for _ in everyone]
        shape = (num_tokens, TOP_K)
        idx = [torch.randint(-1, NUM_EXPERTS, shape, generator=generator) for _ in everyone]
        idx[0][3] = -1
        weights = [torch.rand(shape, generator=generator) for _ in everyone]
        layout = dense.lay_out(idx, num_experts=NUM_EXPERTS)

        before = baseline.wire_bytes
        d = baseline.dispatch(x[rank], idx[rank], weights[rank])
        wire_bytes = baseline.wire_bytes - before
        assert torch.equal(d.tokens, dense.dispatch(layout, x, rank))
        assert torch.equal(d.row_weights, dense.row_weights(layout, weights, rank))
        assert torch.equal(d.tokens_per_expert, layout.tokens_per_expert[rank])

        outputs = [dense.dispatch(layout, x, r).sin() for r in everyone]
        y = baseline.combine(outputs[rank], d)
        wide = [one.double() for one in outputs]
        want = dense.combine(layout, wide, rank, weights[rank])
        assert y.dtype == dtype
        rounding = torch.finfo(dtype).eps * want.abs()
        assert ((y.double() - want).abs() <= rounding + term_error).all()
        assert not y[(idx[rank] < 0).all(dim=1)].any()

        to_rank = layout.rank_TK[rank]
        rows_away = int(((to_rank >= 0) & (to_rank != rank)).sum())
        counts_away = NUM_EXPERTS - NUM_EXPERTS // len(everyone)
        assert wire_bytes == rows_away * (HIDDEN * dtype.itemsize + 4) + counts_away * 8


@pytest.mark.parametrize(
    ("dtype", "keep_buffers", "term_error"),
    [
        (torch.bfloat16, True, 1e-4),
        (torch.bfloat16, False, 1e-4),
        (torch.float16, True, 3e-6),
        (torch.float32, True, 2e-6),
        (torch.float64, False, 2e-15),
    ],
    ids=str,
)
def test_baseline_is_the_dense_answer(
    pool: RankPool, dtype: torch.dtype, keep_buffers: bool, term_error: float
) -> None:
    pool.run(round_trips, dtype, keep_buffers, term_error)
