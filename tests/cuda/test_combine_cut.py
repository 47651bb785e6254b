"""How a combine cuts rows into pieces for shared memory."""

from __future__ import annotations

import pytest

from fusco.engines.cuda.combine import ONE_PIPELINE, TWO_PIPELINES, Crew, assign, cut
from fusco.engines.cuda.kernels import structs

AMPERE, HOPPER = 163 << 10, 227 << 10


@pytest.mark.parametrize("max_shared_bytes", [AMPERE, HOPPER])
@pytest.mark.parametrize("crew", [TWO_PIPELINES, ONE_PIPELINE])
@pytest.mark.parametrize("num_rows", [1, 8, 16, 32])
@pytest.mark.parametrize("row_bytes", [16, 4096, 14336, 14336 + 16, 65536, 1 << 20])
def test_pieces_cover_a_row_and_fit(
    max_shared_bytes: int, crew: Crew, num_rows: int, row_bytes: int
) -> None:
    piece_bytes, num_slots, shared_bytes = cut(row_bytes, crew, num_rows, max_shared_bytes)
    assert piece_bytes % 16 == 0
    assert num_slots >= num_rows
    buffers = crew.num_pipelines * structs.SENDERS * piece_bytes
    rings = crew.num_pipelines * num_slots * piece_bytes
    assert rings + buffers + structs.COMBINE_SHARED_BYTES == shared_bytes <= max_shared_bytes


@pytest.mark.parametrize("crew", [TWO_PIPELINES, ONE_PIPELINE])
def test_a_block_has_room_for_its_warps(crew: Crew) -> None:
    assert crew.num_pipelines <= structs.PIPELINES
    assert crew.num_threads <= structs.COMBINE_WARPS * 32


def test_rows_that_fit_are_whole() -> None:
    assert cut(4096, TWO_PIPELINES, 8, HOPPER).piece_bytes == 4096
    assert cut(14336, ONE_PIPELINE, 8, HOPPER).piece_bytes == 14336


def test_more_rows_need_smaller_pieces() -> None:
    assert cut(7168, TWO_PIPELINES, 8, HOPPER).piece_bytes == 7168
    assert cut(7168, TWO_PIPELINES, 16, HOPPER).piece_bytes < 7168


@pytest.mark.parametrize(
    ("row_bytes", "num_rows", "has_many_blocks", "crew"),
    [
        (7168, 8, True, TWO_PIPELINES),
        (14336, 8, True, ONE_PIPELINE),
        (14336, 8, False, TWO_PIPELINES),
        (7168, 16, True, ONE_PIPELINE),  # of which two pipelines have no room for as many
    ],
)
def test_who_sums(row_bytes: int, num_rows: int, has_many_blocks: bool, crew: Crew) -> None:
    got, pieces = assign(row_bytes, num_rows, HOPPER, has_many_blocks=has_many_blocks)
    assert got == crew
    assert pieces == cut(row_bytes, crew, num_rows, HOPPER)
