"""The two-level engine where a rank is short of memory, and where there is much to do at once."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fusco
from fusco.engines.cpu import node
from fusco.testing.cases import Case, draw, expect_round_trip, expect_same
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(50, 90, 0, 70), ranks_per_node=2)
CULPRIT = 1
PROMPT_S = 60.0


def strided(rows: Any) -> Tensor:
    """The same with gaps between them."""
    return torch.cat((rows, rows), dim=1)[:, : rows.shape[1]]


def short_of_memory(rank: int, operation: str, where: str, problem: Exception) -> str:
    """What a call raises where one rank has no memory before it has asked the others."""
    group = subgroup(range(CASE.num_ranks))
    if group is None:
        return ""
    inputs = draw(CASE)
    x, outputs = strided(inputs.x[rank]), strided(inputs.outputs[rank])
    fails = mock.patch(f"fusco.engines.{where}", side_effect=problem)
    text = ""
    with CASE.shuffle(group, "two_level", timeout_s=10) as shuffle:
        d = shuffle.dispatch(x, inputs.topk_idx[rank], inputs.weights_of(rank))
        calls = {
            "dispatch": lambda: shuffle.dispatch(x, inputs.topk_idx[rank]),
            "dispatch again": lambda: shuffle.dispatch(x, plan=d.plan),
            "combine": lambda: shuffle.combine(outputs, d),
        }
        with fails if rank == CULPRIT else contextlib.nullcontext():
            try:
                calls[operation]()
            except fusco.WindowMemoryError as error:
                text = str(error)
        expect_round_trip(shuffle, inputs, rank)
    return text


@pytest.mark.parametrize(
    ("operation", "where", "problem"),
    [
        ("dispatch", "cpu.sliced.CompiledPlanner.count", MemoryError("none left")),
        ("dispatch", "cpu.sliced.CompiledPlanner.count", torch.OutOfMemoryError("none left")),
        ("dispatch", "two_level.dispatch.without_gaps", RuntimeError("none left")),
        ("dispatch again", "two_level.dispatch.without_gaps", RuntimeError("none left")),
        ("combine", "two_level.combine.without_gaps", RuntimeError("none left")),
    ],
)
def test_all_raise_what_one_has_no_memory_for(
    pool: RankPool, operation: str, where: str, problem: Exception
) -> None:
    for text in pool.run(short_of_memory, operation, where, problem)[: CASE.num_ranks]:
        assert f"{operation.split()[0]}: none left" in text


def given_with_gaps(rank: int) -> list[str]:
    """The operations of the node that get rows with gaps, which they would copy at every slice."""
    group = subgroup(range(CASE.num_ranks))
    if group is None:
        return []
    inputs, found = draw(CASE), []

    def watched(name: str) -> Any:
        function = getattr(node._CpuBlocks, name)

        def watch(blocks: Any, section: int, rows: Tensor, *others: Any) -> None:
            if not all(each is None or each.is_contiguous() for each in (rows, others[0])):
                found.append(name)
            function(blocks, section, rows, *others)

        return mock.patch.object(node._CpuBlocks, name, watch)

    with CASE.shuffle(group, "two_level") as shuffle, watched("scatter"), watched("push_sums"):
        d = shuffle.dispatch(
            strided(inputs.x[rank]), inputs.topk_idx[rank], inputs.weights_of(rank)
        )
        again = shuffle.dispatch(strided(inputs.x[rank]), plan=d.plan)
        weights = d.row_weights[:, None].expand(-1, 2).contiguous()[:, 0]
        y = shuffle.combine(strided(inputs.outputs[rank]), replace(d, row_weights=weights))
    expect_same(d.tokens, inputs.rows(rank), "tokens")
    expect_same(again.tokens, inputs.rows(rank), "tokens again")
    expect_same(y, inputs.sums(rank), "combine")
    return found


def test_rows_with_gaps_are_copied_once(pool: RankPool) -> None:
    assert pool.run(given_with_gaps) == [[]] * pool.num_ranks


def make_without(rank: int, what: str) -> tuple[str, float]:
    """What the making of a Shuffle raises where one rank cannot make a part of it, and after how
    long."""
    group = subgroup(range(CASE.num_ranks))
    if group is None:
        return "", 0.0
    problem = torch.OutOfMemoryError("none left")
    fails = mock.patch(f"fusco.engines.{what}", side_effect=problem)
    text, begin_s = "", time.monotonic()
    with fails if rank == CULPRIT else contextlib.nullcontext():
        try:
            CASE.shuffle(group, "two_level")
        except fusco.EngineUnavailableError as error:
            text = str(error)
    took_s = time.monotonic() - begin_s
    with CASE.shuffle(group, "two_level") as shuffle:
        expect_round_trip(shuffle, draw(CASE), rank)
    return text, took_s


@pytest.mark.parametrize("what", ["two_level.session.SliceTransport", "cpu.session.Window"])
def test_all_raise_what_one_cannot_make(pool: RankPool, what: str) -> None:
    for text, took_s in pool.run(make_without, what)[: CASE.num_ranks]:
        assert f"rank {CULPRIT}: none left" in text
        assert took_s < PROMPT_S


def lost_while_made(rank: int) -> tuple[int, float]:
    """Whom the making of a Shuffle names where a rank misses another, and after how long."""
    missed = fusco.PeerError("Shuffle: rank 0 is gone", operation="Shuffle", rank=0)
    fails = mock.patch("fusco.engines.cpu.node.Session", side_effect=missed)
    begin_s = time.monotonic()
    with fails if rank == CULPRIT else contextlib.nullcontext():
        try:
            CASE.shuffle(None, "two_level")
        except fusco.PeerError as error:
            return error.rank, time.monotonic() - begin_s
    return -1, 0.0


def test_a_rank_lost_while_a_shuffle_is_made_is_missed_by_all() -> None:
    with RankPool(CASE.num_ranks) as ranks:
        found = ranks.run(lost_while_made)
    assert all(took_s < PROMPT_S for _, took_s in found)
    # Both have left: the one that misses rank 0, and rank 0 itself, which misses that one.
    named = [lost for lost, _ in found]
    assert named[0] == CULPRIT
    assert named[CULPRIT] == 0
    assert set(named) == {0, CULPRIT}


def many_slices(rank: int) -> None:
    """A tuple of four in as many slices as there can be, a token in each."""
    case = Case(num_tokens=(16384, 0), hidden_size=1 << 18, top_k=1, num_experts=2)
    group = subgroup(range(case.num_ranks))
    if group is None:
        return
    num_tokens = case.num_tokens[rank]
    x = tuple(torch.full((num_tokens, 1), float(part)) for part in range(4))
    with case.shuffle(group, "two_level", placement=(0, 0), timeout_s=30) as shuffle:
        d = shuffle.dispatch(x, torch.zeros((num_tokens, 1), dtype=torch.int64))
        y = shuffle.combine(d.tokens, d)
    expect_same(y, x, "combine")


def test_a_tuple_in_many_slices(pool: RankPool) -> None:
    pool.run(many_slices)
