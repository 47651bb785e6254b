"""Rows scattered and summed by lists, in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fusco.layout.segments import as_segments, as_words

_CHUNK_BYTES = 64 << 20
"""Rows on their way to scattered places, and sums, pass through so much memory at most."""


def scatter_rows(rows: Tensor, source: Tensor, place: Tensor, out: Tensor) -> None:
    """Write `rows[source[i]]` to row `place[i]` of `out`.

    Args:
        rows: `[n, ...]`.
        source: int64 `[m]`.
        place: int64 `[m]`, all different.
        out: uint8 `[bytes]`, rows of the same size.
    """
    if not source.shape[0] or not rows.numel():
        return
    segments = as_segments(rows)
    width = segments.shape[1]
    words, target = as_words(segments, out.view(-1, width))
    step = max(1, _CHUNK_BYTES // width)
    for begin in range(0, source.shape[0], step):
        part = slice(begin, begin + step)
        target.index_copy_(0, place[part], words.index_select(0, source[part]))


def list_sums(
    rows: Tensor, weights: Tensor | None, list_ptr: Tensor, item: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sums of listed rows, some lists at a time; see `Node.sum_rows`.

    Longest lists first, so that no row is read where a list has ended.

    Yields:
        int64 `[n]`, the list of each sum; and the sums, `[n, elements]` of the dtype of `rows`.
    """
    flat = rows.reshape(rows.shape[0], rows.shape[1:].numel())
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    counts = list_ptr.diff()
    order = torch.argsort(counts, descending=True)
    first = list_ptr[:-1][order]
    longer = _longer_than(counts)
    step = max(1, _CHUNK_BYTES // max(flat.shape[1] * wide.itemsize, 1))
    for begin in range(0, counts.shape[0], step):
        chunk = first[begin : begin + step]
        total = torch.zeros((chunk.shape[0], flat.shape[1]), dtype=wide, device=rows.device)
        for k, end in enumerate(longer):
            if end <= begin:
                break
            chosen = item[chunk[: end - begin] + k]
            term = flat.index_select(0, chosen)
            if weights is not None:
                # Rounded on its own: the contract knows no fused multiply-add.
                term = term * weights.index_select(0, chosen).to(wide)[:, None]
            total[: end - begin].add_(term)
        yield order[begin : begin + step], total.to(rows.dtype)


def _longer_than(counts: Tensor) -> list[int]:
    """How many lists have more than k items, for k from 0 on."""
    if not counts.shape[0]:
        return []
    numbers = torch.bincount(counts)
    return numbers.flip(0).cumsum(0).flip(0)[1:].tolist()


def by_rank(target: Tensor, ranks: Sequence[int]) -> Iterator[tuple[int, Tensor | None]]:
    """Where each rank is the target: its place among `ranks`, and positions in `target`; None for
    all, where there is one rank."""
    if len(ranks) == 1:
        yield 0, None
        return
    order = torch.argsort(target, stable=True)
    counts = torch.bincount(target, minlength=max(ranks) + 1).tolist()
    chosen = order.split(counts)
    for place, rank in enumerate(ranks):
        if counts[rank]:
            yield place, chosen[rank]
