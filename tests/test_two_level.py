"""The two-level engine where a rank is short of memory, and where there is much to do at once."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch

import fusco
from fusco.engines.cpu.sliced import CompiledPlanner
from fusco.testing.cases import Case, draw, expect_round_trip
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(50, 90, 0, 70), ranks_per_node=2)
CULPRIT = 1
PROBLEMS = [MemoryError("none left"), torch.OutOfMemoryError("none left")]


def short_of_memory(rank: int, where: Any, name: str, problem: Exception) -> str:
    """What a dispatch raises where one rank has no memory before it has asked the others."""
    group = subgroup(range(CASE.num_ranks))
    if group is None:
        return ""
    inputs = draw(CASE)
    fails = mock.patch.object(where, name, side_effect=problem)
    with CASE.shuffle(group, "two_level", timeout_s=10) as shuffle:
        with fails if rank == CULPRIT else contextlib.nullcontext():
            try:
                shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
                text = "nothing"
            except fusco.WindowMemoryError as error:
                text = str(error)
        expect_round_trip(shuffle, inputs, rank)
    return text


@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_memory_to_count(pool: RankPool, problem: Exception) -> None:
    for text in pool.run(short_of_memory, CompiledPlanner, "count", problem)[: CASE.num_ranks]:
        assert "dispatch: none left" in text
