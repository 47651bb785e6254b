"""Batches of items, which the pipelines of a combine take: every item is in one of them."""

from __future__ import annotations

import pytest
from evaluated import expect


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("num_items", [0, 1, 7, 8, 9, 10, 11, 20])
def test_every_item_is_in_one_batch(num_items: int, size: int) -> None:
    num_single = 8
    num_full = max(0, num_items - num_single) // size
    sizes = [size] * num_full
    sizes += [1] * (num_items - sum(sizes))
    checks = [("batches.count()", len(sizes))]
    for number, expected in enumerate(sizes):
        checks += [
            (f"batches[{number}].first", sum(sizes[:number])),
            (f"batches[{number}].num_items", expected),
        ]
    behind = len(sizes)
    checks += [(f"batches[{number}].num_items", 0) for number in (behind, behind + 1000)]
    expect("queue.cuh", checks, f"const Batches batches({num_items}, {size}, {num_single});\n")


@pytest.mark.parametrize(
    ("num_returners", "num_places"), [(92, 264), (132, 264), (24, 48), (1, 2), (3, 7)]
)
def test_returners_are_spread_from_the_first_on(num_returners: int, num_places: int) -> None:
    places = [i * num_places // num_returners for i in range(num_returners)]
    checks = [
        (
            f"returners_before({place}, {num_returners}, {num_places})",
            sum(p < place for p in places),
        )
        for place in range(num_places + 1)
    ]
    expect("queue.cuh", checks)
