"""Kernels find the parts of `links` and of a block where `layout/compact.py` puts them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from evaluated import CompileError, expect

from fusco.layout.compact import Links, links_len, part_starts

LINKS_AT = 1 << 20
SHAPES = [(1, 1, 1, 1), (0, 2, 7, 3), (5, 3, 8, 2), (4096, 8, 8192, 8), (100_000, 72, 131_072, 16)]
"""Tokens, ranks, the most tokens, top-k."""
BLOCKS = [((), 3), ((16,), 0), ((16,), 9), ((14336, 448), 1001), ((7168, 224, 16, 64), 1 << 20)]
"""Bytes of a row of each tensor, and rows."""


@pytest.mark.parametrize(("num_tokens", "num_ranks", "max_tokens", "top_k"), SHAPES)
def test_links(num_tokens: int, num_ranks: int, max_tokens: int, top_k: int) -> None:
    size = links_len(num_tokens, num_ranks, max_tokens, top_k)
    whole = torch.empty(size, dtype=torch.int32, device="meta")
    parts = Links.split(whole, num_tokens, num_ranks, top_k)
    setup = (
        f"World world{{}}; world.num_ranks = {num_ranks}; world.max_tokens = {max_tokens};"
        f" world.top_k = {top_k};\n"
        f"const Links links(world, {num_tokens}, {LINKS_AT}ull);\n"
    )

    def at(pointer: str, part: torch.Tensor) -> tuple[str, int]:
        return f"reinterpret_cast<u64>({pointer})", LINKS_AT + 4 * int(part.storage_offset())

    checks = [at(f"links.{each.name}", getattr(parts, each.name)) for each in fields(Links)]
    for rank, segment in {(0, 0), (num_ranks - 1, max_tokens - 1), (num_ranks // 2, 0)}:
        slots = parts.arrival_slot[rank, segment]
        checks.append(at(f"links.slots(world, {rank}, {segment})", slots))
    expect("links.cuh", checks, setup)


@pytest.mark.parametrize(("row_bytes", "num_rows"), BLOCKS)
def test_block(row_bytes: tuple[int, ...], num_rows: int) -> None:
    *starts, end = part_starts(row_bytes, num_rows)
    setup = f"constexpr i32 row_bytes[] = {{{', '.join(map(str, (*row_bytes, 0)))}}};\n"
    checks = []

    def check(name: str, what: str, value: int) -> None:
        nonlocal setup
        setup += f"constexpr i64 {name} = {what};\n"
        checks.append((name, value))

    for part, start in enumerate(starts):
        check(f"part_{part}", f"part_at(row_bytes, {part}, {num_rows})", start)
    check("end", f"block_bytes(row_bytes, {len(row_bytes)}, {num_rows})", end)
    expect("links.cuh", checks, setup)


@pytest.mark.parametrize("wrong", [0, 2])
def test_a_wrong_number_is_noticed(wrong: int) -> None:
    with pytest.raises(CompileError, match="differs_1"):
        expect("links.cuh", [("round_up(1, 1)", 1), ("round_up(1, 1)", wrong)])
