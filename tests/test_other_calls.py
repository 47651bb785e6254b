"""Ranks that call different things of one group wait for each other in vain, and say so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import fusco
from fusco.testing.cases import Case, draw
from fusco.testing.ranks import RankPool
from fusco.types import Segments

CASE = Case(num_tokens=(5, 7, 3, 2), hidden_size=8, top_k=2, num_experts=8, ranks_per_node=2)
TIMEOUT_S = 3.0


def call_differently(rank: int, engine: str, what: str) -> str:
    """What rank 0 is told, which does something else than dispatch, or the others, which do."""
    inputs = draw(CASE)
    x, idx = inputs.x[rank], inputs.topk_idx[rank]
    larger = replace(CASE, num_experts=64)
    dist.barrier()  # not all have imported this file at once
    one = CASE.shuffle(None, engine, timeout_s=TIMEOUT_S)
    other = larger.shuffle(None, engine, timeout_s=TIMEOUT_S)
    try:
        if rank:
            one.dispatch(x, idx)
        elif what == "another Shuffle":
            other.dispatch(x, idx)
        elif what == "a new Shuffle":
            one.close()
            CASE.shuffle(None, engine, timeout_s=TIMEOUT_S)
        else:
            none = torch.zeros(0, dtype=torch.int64)
            segments = [Segments(offset=none, size=none)] * CASE.num_ranks
            fusco.exchange(x, segments, x, segments, engine=engine, timeout_s=TIMEOUT_S)
    except fusco.PeerError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        ("reference", "another Shuffle"),
        ("reference", "a new Shuffle"),
        ("reference", "an exchange"),
        ("two_level", "another Shuffle"),
    ],
)
def test_calls_of_one_group_are_told_apart(engine: str, what: str) -> None:
    with RankPool(4, timeout_s=60.0) as pool:
        told = pool.run(call_differently, engine, what)
    assert all("rank" in each for each in told), told
