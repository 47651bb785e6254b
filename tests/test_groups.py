"""Groups: parts of a larger job, device meshes, several Shuffles alive, nodes of any shape."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fusco
from fusco.testing import dense
from fusco.testing.cases import (
    Case,
    draw,
    expect,
    expect_dispatched,
    expect_round_trip,
    expect_same,
    sizes,
)
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(6, 17), hidden_size=24, top_k=3, num_experts=8, dtype=torch.bfloat16)


def over(group: dist.ProcessGroup | None, **changes: object) -> Case:
    num_tokens = sizes((6, 17, 0), group)
    return replace(CASE, num_tokens=num_tokens, num_experts=4 * len(num_tokens), **changes)  # type: ignore[arg-type]


def in_default_group(rank: int, engine: str) -> None:
    case = over(None)
    with case.shuffle(None, engine) as shuffle:
        expect_round_trip(shuffle, draw(case), rank)
        expect(shuffle.topology.num_ranks == 8, f"topology {shuffle.topology}")
        expect(shuffle.engine_name == engine, shuffle.engine_name)


def in_disjoint_groups(rank: int, engine: str) -> None:
    """Two groups of different sizes shuffle at the same time; their ranks interleave."""
    evens, odds = subgroup((0, 2, 4, 6, 7)), subgroup((1, 3, 5))
    group = evens or odds
    case = over(group, seed=dist.get_world_size(group))
    with case.shuffle(group, engine) as shuffle:
        for round_ in range(3):
            expect_round_trip(shuffle, draw(case, round_), dist.get_rank(group))


def in_overlapping_groups(rank: int, engine: str) -> None:
    """A rank is in a row and a column at once, with a Shuffle over each, and their calls mix."""
    if rank >= 6:
        for members in ((0, 1, 2), (3, 4, 5), (0, 3), (1, 4), (2, 5)):
            subgroup(members)
        return
    rows = [subgroup(members) for members in ((0, 1, 2), (3, 4, 5))]
    columns = [subgroup(members) for members in ((0, 3), (1, 4), (2, 5))]
    row, column = rows[rank // 3], columns[rank % 3]
    case_row, case_column = over(row, seed=1), over(column, hidden_size=40, seed=2)
    inputs_row, inputs_column = draw(case_row), draw(case_column)
    place_row, place_column = dist.get_rank(row), dist.get_rank(column)
    with (
        case_row.shuffle(row, engine) as one,
        case_column.shuffle(column, engine) as other,
    ):
        for _ in range(2):
            d = one.dispatch(
                inputs_row.x[place_row],
                inputs_row.topk_idx[place_row],
                inputs_row.weights_of(place_row),
            )
            expect_round_trip(other, inputs_column, place_column)
            y = one.combine(inputs_row.outputs[place_row], d)
            expect_dispatched(d, inputs_row, place_row)
            expect_same(y, inputs_row.sums(place_row), "combine over the row")


def in_device_mesh(rank: int, engine: str) -> None:
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "expert"))
    case = over(mesh["expert"].get_group())
    with case.shuffle(mesh["expert"], engine) as shuffle:  # type: ignore[arg-type]
        expect_round_trip(shuffle, draw(case), mesh.get_local_rank("expert"))
    raised = ""
    try:
        case.shuffle(mesh, engine)  # type: ignore[arg-type]
    except fusco.InputError as error:
        raised = str(error)
    expect("group" in raised and "dimension" in raised, f"a 2-d mesh: {raised!r}")


def on_odd_nodes(rank: int, engine: str) -> None:
    """Nodes of different sizes whose ranks interleave, as FUSCO_NODE_ID can say."""
    nodes = (7, 3, 7, 3, 3, 9)
    group = subgroup(range(len(nodes)))
    if group is None:
        return
    os.environ["FUSCO_NODE_ID"] = str(nodes[rank])
    case = over(group, top_k=6, routing="repeated")
    inputs = draw(case)
    try:
        with case.shuffle(group, engine) as shuffle:
            d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
            y = shuffle.combine(inputs.outputs[rank], d)
            num_nodes = shuffle.topology.num_nodes
    finally:
        del os.environ["FUSCO_NODE_ID"]
    expect(num_nodes == 3, f"{num_nodes} nodes")
    expect_dispatched(d, inputs, rank)
    want = dense.combine(
        inputs.layout,
        inputs.outputs,
        rank,
        inputs.weights_of(rank),
        node_of_rank=[0, 1, 0, 1, 1, 2],  # numbered by their first rank
    )
    expect_same(y, want, "combine")


def without_other_groups(rank: int, engine: str) -> None:
    """No other group is ever created."""
    group = subgroup((0, 1, 2))
    before = len(dist.distributed_c10d._world.pg_map)
    if group is not None:
        case = over(group)
        with case.shuffle(group, engine) as shuffle:
            expect_round_trip(shuffle, draw(case), rank)
    expect(len(dist.distributed_c10d._world.pg_map) == before, "a process group was created")


@pytest.mark.parametrize(
    "fn",
    [
        in_default_group,
        in_disjoint_groups,
        in_overlapping_groups,
        in_device_mesh,
        on_odd_nodes,
        without_other_groups,
    ],
    ids=lambda fn: fn.__name__,
)
def test_group(pool: RankPool, host_engine: str, fn: Callable[[int, str], None]) -> None:
    pool.run(fn, host_engine)


def lifetimes(rank: int, engine: str) -> list[str]:
    """What use after closing raises, and that closing twice is fine."""
    group = subgroup((0, 1))
    if group is None:
        return []
    case = over(group)
    inputs = draw(case)
    shuffle = case.shuffle(group, engine)
    d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
    x = inputs.x[rank].clone().requires_grad_()
    loss = shuffle.dispatch(x, inputs.topk_idx[rank]).tokens.sum()
    shuffle.close()
    shuffle.close()
    expect_dispatched(d, inputs, rank)  # rows outlive their Shuffle
    errors = []
    for call in (
        lambda: shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank]),
        lambda: shuffle.combine(inputs.outputs[rank], d),
        loss.backward,
        shuffle.__enter__,
    ):
        try:
            call()
        except fusco.ClosedError as error:
            errors.append(str(error))
    with case.shuffle(group, engine) as again:
        expect_round_trip(again, inputs, rank)
    return errors


def test_closing(pool: RankPool, host_engine: str) -> None:
    for errors in pool.run(lifetimes, host_engine)[:2]:
        assert len(errors) == 4
        assert all("leave it open until the last backward" in text for text in errors)
