"""Every mistake raises its named error on every rank, promptly, and the next call works."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fusco
from conftest import CUDA
from fusco.api import _tensors_in
from fusco.checks import _kinds
from fusco.plans import Plan
from fusco.testing.cases import device_of, draw, expect_round_trip
from fusco.testing.mistakes import (
    CASE,
    CUDA_MISTAKES,
    MISTAKES,
    Mistake,
    Ready,
    expect_mistake,
    make_mistake,
)
from fusco.testing.ranks import RankPool, subgroup

MEMBERS = (1, 2, 3)


def mistake_of(name: str) -> Mistake:
    return MISTAKES.get(name) or CUDA_MISTAKES[name]


def make_by_name(rank: int, name: str, engine: str) -> tuple[str, ...]:
    group = subgroup(MEMBERS)
    return () if group is None else make_mistake(mistake_of(name), group, engine)


def check(pool: RankPool, name: str, engine: str) -> None:
    outcomes = pool.run(make_by_name, name, engine)
    for rank, member in enumerate(MEMBERS):
        expect_mistake(mistake_of(name), outcomes[member], rank)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(pool: RankPool, engine: str, name: str) -> None:
    check(pool, name, engine)


@pytest.mark.parametrize("engine", [CUDA])
@pytest.mark.parametrize("name", CUDA_MISTAKES)
def test_mistake_with_gpus(pool: RankPool, engine: str, name: str) -> None:
    check(pool, name, engine)


def all_in_one(rank: int, engine: str) -> int:
    """Many mistakes in one Shuffle, with nothing right in between, leave it in order."""
    group = subgroup(MEMBERS)
    if group is None:
        return 0
    case = replace(CASE, device=device_of(engine))
    rank, inputs = dist.get_rank(group), draw(case)
    num_raised = 0
    with case.shuffle(group, engine) as shuffle:
        arguments = inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank)
        d = shuffle.dispatch(*arguments)
        ready = Ready(shuffle=shuffle, other=shuffle, d=d, d_other=d, inputs=inputs, rank=rank)
        for name in ("id-huge", "x-is-too-wide", "another-call-here", "too-many-tokens"):
            mistake = MISTAKES[name]
            for _ in range(5):
                try:
                    (mistake.call if rank in mistake.by else mistake.elsewhere)(ready)
                    shuffle.synchronize()
                except fusco.FuscoError:
                    num_raised += 1
        expect_round_trip(shuffle, inputs, rank)
    return num_raised


def test_many_mistakes_in_a_row(pool: RankPool, engine: str) -> None:
    assert [pool.run(all_in_one, engine)[member] for member in MEMBERS] == [20] * 3


def test_tensors_are_found_in_arguments_that_nobody_has_checked() -> None:
    one, two, three = torch.zeros(2), torch.zeros(3), torch.zeros(4)
    plan = mock.create_autospec(Plan, instance=True)
    plan.to_tensors.return_value = [three]
    d = fusco.Dispatched(tokens=one, row_weights=two, plan=plan)
    found = _tensors_in(one, None, 3, "x", (two, "y", [one]), one.to_sparse(), d)
    assert [id(each) for each in found] == [id(each) for each in (one, two, one, two, three)]


def test_many_wrong_things_are_counted() -> None:
    assert _kinds([[1.0]] * 64) == "64 of list"
    assert _kinds([1, "a"]) == "int, str"
