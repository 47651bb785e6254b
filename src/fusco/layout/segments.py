"""Tensors as rows of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_segments(rows: Tensor) -> Tensor:
    """A tensor of any dtype as uint8 `[num_rows, row_bytes]`, one segment a row."""
    shape = (rows.shape[0], bytes_per_row(rows))
    if rows.numel() == 0:
        return torch.empty(shape, dtype=torch.uint8, device=rows.device)
    return rows.contiguous().view(rows.shape[0], -1).view(torch.uint8).view(shape)


def from_segments(segments: Tensor, like: Tensor) -> Tensor:
    """The inverse: uint8 `[num_rows, row_bytes]` with the dtype and row shape of `like`."""
    shape = (segments.shape[0], *like.shape[1:])
    if segments.numel() == 0:
        return torch.empty(shape, dtype=like.dtype, device=segments.device)
    return segments.view(like.dtype).view(shape)


def as_words(*segments: Tensor) -> list[Tensor]:
    """Tensors of segments, uint8 `[n, row_bytes]` of one size, seen as the widest integers that
    all their rows are made of: fewer elements to move."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(_is_made_of(each, dtype.itemsize) for each in segments):
            return [each.view(dtype) for each in segments]
    return list(segments)


def _is_made_of(segments: Tensor, word_bytes: int) -> bool:
    """Views of words count whole ones from the beginning of the storage, wherever that lies."""
    places = (segments.shape[1], segments.storage_offset(), segments.data_ptr())
    return all(place % word_bytes == 0 for place in places)


def without_gaps(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same tensors contiguous, copied if they must be."""
    return tuple([each.contiguous() for each in rows])


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as uint8 `[bytes]`, the same memory."""
    return tensor.detach().view(-1).view(torch.uint8)


def bytes_per_row(rows: Tensor) -> int:
    """Bytes of one row of `rows` `[num_rows, ...]`."""
    return rows.element_size() * rows.shape[1:].numel()


def describe_format(dtype: torch.dtype, row_shape: Sequence[int]) -> str:
    """The row format in words, such as `bfloat16[*, 2048]`."""
    sizes = "".join(f", {size}" for size in row_shape)
    return f"{str(dtype).removeprefix('torch.')}[*{sizes}]"
