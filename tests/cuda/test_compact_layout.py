"""The one source of a GPU's byte offsets: parts do not overlap, are aligned, and have room."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusco.layout.compact import (
    BLOCK_ALIGNMENT,
    RECORD_HEAD,
    Links,
    WindowLayout,
    chunk_bytes,
    links_len,
    part_starts,
    round_up,
)

small = st.integers(1, 9)


@given(num_tokens=st.integers(0, 9), num_ranks=small, max_tokens=small, top_k=small)
def test_links_are_split_whole(
    num_tokens: int, num_ranks: int, max_tokens: int, top_k: int
) -> None:
    size = links_len(num_tokens, num_ranks, max_tokens, top_k)
    parts = Links.split(torch.arange(size, dtype=torch.int32), num_tokens, num_ranks, top_k)
    found = [getattr(parts, field.name) for field in fields(parts)]
    assert torch.cat([each.flatten() for each in found]).tolist() == list(range(size))
    assert parts.token_segment.shape == (num_tokens, num_ranks)
    assert parts.arrival_slot.shape == (num_ranks, max_tokens, top_k)


@given(row_bytes=st.lists(st.integers(1, 300).map(lambda n: 16 * n), max_size=4), num_rows=small)
def test_parts_of_a_dispatch(row_bytes: list[int], num_rows: int) -> None:
    starts = part_starts(row_bytes, num_rows)
    assert starts[0] == 0
    for size, (begin, end) in zip((*row_bytes, 4), pairwise(starts), strict=True):
        assert begin % BLOCK_ALIGNMENT == 0
        assert size * num_rows <= end - begin < size * num_rows + BLOCK_ALIGNMENT


def test_a_dispatch_of_nothing_takes_no_room() -> None:
    assert part_starts([14336, 512], 0) == [0, 0, 0, 0]


layouts = st.builds(
    WindowLayout,
    num_ranks=small,
    num_experts=st.integers(1, 70),
    max_tokens=st.integers(1, 300),
    top_k=st.integers(1, 16),
    row_bytes=st.integers(1, 20).map(lambda n: 16 * n),
    max_parts=st.integers(1, 4),
)


@given(layout=layouts)
def test_parts_of_a_window(layout: WindowLayout) -> None:
    offsets = layout.offsets()
    starts = list(offsets.values())
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert all(start % BLOCK_ALIGNMENT == 0 for start in starts)
    sizes = (end - begin for begin, end in pairwise(starts))
    room = dict(zip(offsets, sizes, strict=False))
    segments = layout.num_ranks * layout.max_tokens
    assert room["records_at"] >= 2 * layout.num_ranks * layout.record_bytes
    assert room["arrival_flags_at"] >= segments * 8
    assert room["shipments_at"] >= segments * layout.top_k * 8
    assert room["returns_at"] >= layout.num_returns * layout.row_bytes


@given(layout=layouts)
def test_a_record_holds_head_and_counts(layout: WindowLayout) -> None:
    counts = layout.num_experts + layout.num_ranks
    assert layout.record_bytes >= RECORD_HEAD * 8 + counts * 4
    assert layout.record_bytes % 8 == 0


@given(layout=layouts)
def test_every_token_has_room_for_its_partials(layout: WindowLayout) -> None:
    others = layout.num_ranks - 1
    assert layout.num_returns == layout.max_tokens * min(layout.top_k, others)


@given(size=st.integers(0, 10**6), unit=st.integers(1, 4096))
def test_round_up(size: int, unit: int) -> None:
    assert round_up(size, unit) % unit == 0
    assert size <= round_up(size, unit) < size + unit


@given(need=st.integers(1, 10**9))
def test_a_new_chunk_has_room(need: int) -> None:
    assert need <= chunk_bytes(need) <= 1.25 * need + (2 << 20)
