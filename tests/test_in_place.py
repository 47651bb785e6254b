"""Expert outputs in `Shuffle.empty_like` combine to the same bits as outputs anywhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import fusco
from fusco.testing.cases import Case, Inputs, device_of, draw, expect_same, two_nodes
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(40, 0, 23, 17), hidden_size=130, top_k=5, num_experts=8)
CASES = {
    "bfloat16": replace(CASE, dtype=torch.bfloat16),
    "float16": replace(CASE, dtype=torch.float16),
    "float64": replace(CASE, dtype=torch.float64),
    "one-expert": replace(CASE, routing="one-expert"),
    "aligned": replace(CASE, expert_alignment=16),
    "plain": replace(CASE, weighted=False),
    # The room for outputs makes the window grow, which peers learn only as they read there.
    "grown": replace(CASE, num_tokens=(1500, 1500, 0, 1500)),
    "two-nodes": two_nodes(replace(CASE, dtype=torch.bfloat16)),
}


def outputs_of(inputs: Inputs, rank: int) -> torch.Tensor:
    outputs = inputs.outputs[rank]
    assert isinstance(outputs, torch.Tensor)
    return outputs


def combine(rank: int, engine: str, case: Case, in_place: tuple[int, ...]) -> None:
    """Some of four ranks have their outputs in place, and write over them after each combine."""
    group = subgroup(range(4))
    if group is None:
        return
    inputs = draw(replace(case, device=device_of(engine)))
    outputs = outputs_of(inputs, rank)
    with inputs.case.shuffle(group, engine) as shuffle:
        for _ in range(5):
            d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
            rows = outputs.clone()
            if rank in in_place:
                rows = shuffle.empty_like(outputs).copy_(outputs)
            y = shuffle.combine(rows, d)
            rows.fill_(-7)
            expect_same(y, inputs.sums(rank), "combine")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("in_place", [(0, 1, 2, 3), (0, 2), (3,)], ids=str)
def test_the_same_bits(pool: RankPool, engine: str, name: str, in_place: tuple[int, ...]) -> None:
    pool.run(combine, engine, CASES[name], in_place)


def like_nothing(rank: int, engine: str) -> list[str]:
    """What `empty_like` of no rows raises, which only this rank is told."""
    group = subgroup(range(4))
    if group is None:
        return []
    case = replace(CASE, device=device_of(engine))
    errors = []
    with case.shuffle(group, engine) as shuffle:
        for rows in (None, (torch.zeros(1, 2),), torch.zeros(())):
            try:
                shuffle.empty_like(rows)  # type: ignore[arg-type]
            except fusco.InputError as error:
                errors.append(str(error))
    return errors


def test_like_nothing(pool: RankPool, engine: str) -> None:
    for errors in pool.run(like_nothing, engine)[:4]:
        got = [text.partition(", expected")[0] for text in errors]
        assert got == [
            "empty_like: rows: got NoneType",
            "empty_like: rows: got tuple",
            "empty_like: rows: got a tensor of no dimensions",
        ]


def reuse(rank: int, engine: str) -> None:
    """Experts that write over the rows they were given, and weights of the caller's own."""
    group = subgroup(range(4))
    if group is None:
        return
    inputs = draw(replace(CASE, device=device_of(engine)))
    with inputs.case.shuffle(group, engine) as shuffle:
        d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
        assert isinstance(d.tokens, torch.Tensor)
        d.tokens.copy_(outputs_of(inputs, rank))
        expect_same(shuffle.combine(d.tokens, d), inputs.sums(rank), "combine of the rows")
        doubled = replace(d, row_weights=d.row_weights * 2)
        got = shuffle.combine(d.tokens, doubled)
        want = shuffle.combine(d.tokens.clone(), doubled)
        expect_same(got, want, "combine with other weights")


def test_rows_written_over_and_other_weights(pool: RankPool, engine: str) -> None:
    pool.run(reuse, engine)


def hold(rank: int, engine: str) -> tuple[int, int]:
    """Bytes that cross are rows that were read, and windows stay as large as they are."""
    group = subgroup(range(4))
    if group is None:
        return 0, 0
    inputs = draw(CASE)
    outputs = outputs_of(inputs, rank)
    sizes = []
    with inputs.case.shuffle(group, engine) as shuffle:
        for _ in range(20):
            d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
            shuffle.combine(shuffle.empty_like(outputs).copy_(outputs), d)
            del d
            sizes.append(shuffle.stats().window_bytes)
            dist.barrier(group)
    return sizes[1], sizes[-1]


def test_windows_do_not_grow(pool: RankPool) -> None:
    for first, last in pool.run(hold, "cpu")[:4]:
        assert first == last
