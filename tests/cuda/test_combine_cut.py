"""How a combine cuts rows into pieces for shared memory, and who begins with what."""

from __future__ import annotations

import pytest

from fusco.engines.cuda.combine import cut, num_returners
from fusco.engines.cuda.kernels import structs

AMPERE, HOPPER = 163 << 10, 227 << 10


@pytest.mark.parametrize("max_shared_bytes", [AMPERE, HOPPER])
@pytest.mark.parametrize("num_rows", [1, 8, 16, 32])
@pytest.mark.parametrize("row_bytes", [16, 4096, 14336, 14336 + 16, 65536, 1 << 20])
def test_pieces_cover_a_row_and_fit(max_shared_bytes: int, num_rows: int, row_bytes: int) -> None:
    piece_bytes, num_slots, shared_bytes = cut(row_bytes, num_rows, max_shared_bytes)
    assert piece_bytes % 16 == 0
    assert num_slots >= num_rows
    num_places = structs.PIPELINES * (num_slots + structs.SENDERS)
    assert num_places * piece_bytes + structs.COMBINE_SHARED_BYTES == shared_bytes
    assert shared_bytes <= max_shared_bytes


def test_rows_that_fit_are_whole() -> None:
    assert cut(4096, 8, HOPPER).piece_bytes == 4096


def test_rows_are_cut_into_what_is_summed_in_one_step() -> None:
    assert cut(14336, 8, HOPPER).piece_bytes == 7168


def test_more_rows_need_smaller_pieces() -> None:
    assert cut(7168, 8, HOPPER).piece_bytes == 7168
    assert cut(7168, 16, HOPPER).piece_bytes < 7168


@pytest.mark.parametrize(
    ("num_pipelines", "num_tokens", "is_cut", "rows_per_token", "expected"),
    [
        (264, 8192, True, 0, 100),
        (264, 264, True, 8, 132),  # one item each at the most
        (264, 8192, False, 8, 132),
        (264, 8192, True, 4, 100),
        (264, 8192, True, 8, 160),
        (264, 8192, True, 16, 176),
        (48, 8192, True, 4, 24),
        (48, 8192, True, 8, 32),
        (2, 0, True, 0, 1),
        (2, 1, False, 1, 1),
    ],
)
def test_who_begins_with_returning(
    num_pipelines: int, num_tokens: int, is_cut: bool, rows_per_token: int, expected: int
) -> None:
    num_rows = rows_per_token * num_tokens
    found = num_returners(num_pipelines, num_tokens, is_cut=is_cut, num_rows=num_rows)
    assert found == expected
