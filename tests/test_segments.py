"""Rows as words: any that are seen as such can be, wherever they lie in their storage."""

from __future__ import annotations

import pytest
import torch

from fusco.layout.segments import as_words

ALIGNMENT = 8


@pytest.mark.parametrize("storage_at", range(ALIGNMENT))
@pytest.mark.parametrize("row_bytes", [8, 12, 6, 5])
def test_words_hold_the_same_bytes(row_bytes: int, storage_at: int) -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    for offset in range(ALIGNMENT):
        # Its storage begins where foreign memory does, which may be anywhere.
        storage = torch.frombuffer(memory.numpy(), dtype=torch.uint8, offset=storage_at)
        rows = storage[offset : offset + 5 * row_bytes].view(5, row_bytes)
        words, others = as_words(rows, torch.empty_like(rows))
        assert words.dtype == others.dtype
        assert words.data_ptr() % words.itemsize == 0
        assert torch.equal(words.view(torch.uint8), rows)


def test_words_are_as_wide_as_can_be() -> None:
    rows = torch.zeros((5, 12), dtype=torch.uint8)
    assert as_words(rows)[0].dtype == torch.int32
    assert as_words(rows[:, :8].contiguous())[0].dtype == torch.int64
    assert as_words(rows[:, :7].contiguous())[0].dtype == torch.uint8
