"""Permutations of rows in Triton. Imported only where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusco.bench.rows import RowMover

# NOTE: for rows of 7168 16-bit elements on an H100: a row a program of eight warps to copy, and to
# sum eight rows of 1024 elements, a 16-byte load of each a thread, all in flight.
_COPY_BLOCK, _COPY_WARPS = 8192, 8
_SUM_BLOCK, _SUM_WARPS = 1024, 4


class TritonRows(RowMover):
    """A kernel a permutation; each row is read once and written once a choice."""

    name = "triton"

    def spread(self, x: Tensor, choice_of_place: Tensor, place_TK: Tensor) -> Tensor:
        top_k = place_TK.shape[1]
        out = x.new_empty((choice_of_place.numel(), x.shape[1]))
        grid, block = _shape(x, len(x), _COPY_BLOCK)
        if len(x):
            _spread[grid](
                x, place_TK, out, x.shape[1], TOP_K=top_k, BLOCK=block, num_warps=_COPY_WARPS
            )
        return out

    def gather(self, rows: Tensor, index: Tensor) -> Tensor:
        out = rows.new_empty((len(index), rows.shape[1]))
        grid, block = _shape(rows, len(index), _COPY_BLOCK)
        if len(index):
            _gather[grid](rows, index, out, rows.shape[1], BLOCK=block, num_warps=_COPY_WARPS)
        return out

    def weighted_sum(self, rows: Tensor, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
        num_tokens, top_k = row_TK.shape
        out = rows.new_empty((num_tokens, rows.shape[1]))
        grid, block = _shape(rows, num_tokens, _SUM_BLOCK)
        if num_tokens:
            _weighted_sum[grid](
                rows,
                row_TK,
                weight_TK,
                out,
                rows.shape[1],
                TOP_K=top_k,
                BLOCK=block,
                num_warps=_SUM_WARPS,
            )
        return out


def _shape(rows: Tensor, num_rows: int, most: int) -> tuple[tuple[int, int], int]:
    """The grid, a program a row and part of it, and the length of a part."""
    block = min(most, triton.next_power_of_2(rows.shape[1]))
    return (num_rows, triton.cdiv(rows.shape[1], block)), block


@triton.jit
def _spread(x, place, out, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    row = tl.load(x + token * hidden + at, mask=inside)
    for k in tl.static_range(TOP_K):
        target = tl.load(place + token * TOP_K + k)
        tl.store(out + target * hidden + at, row, mask=inside & (target >= 0))


@triton.jit
def _gather(rows, index, out, hidden, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    source = tl.load(index + place)
    row = tl.load(rows + source * hidden + at, mask=inside)
    tl.store(out + place * hidden + at, row, mask=inside)


@triton.jit
def _weighted_sum(
    rows,
    place,
    weight,
    out,
    hidden,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        source = tl.load(place + token * TOP_K + k)
        factor = tl.load(weight + token * TOP_K + k)
        row = tl.load(rows + source * hidden + at, mask=inside & (source >= 0), other=0.0)
        total += factor * row.to(tl.float32)
    tl.store(out + token * hidden + at, total.to(out.dtype.element_ty), mask=inside)
