"""How many rows a block of a dispatch moves at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusco.engines.cuda.dispatch import _BYTES_IN_FLIGHT, _MOVING, _WEIGHING, _Format, _Work

H200_SHARED_BYTES = 232448 - 1024


def warps(work: _Work, row_bytes: int, num_sms: int, max_shared_bytes: int) -> int:
    session: Any = SimpleNamespace(num_ranks=8, num_sms=num_sms, max_shared_bytes=max_shared_bytes)
    rows = torch.empty(1, row_bytes, dtype=torch.uint8)
    form = _Format.of((rows,), session, work)
    assert form.shared_bytes <= max_shared_bytes
    assert form.threads % 64 == 0  # half of the warps send first
    return form.threads // 32


@pytest.mark.parametrize("work", [_MOVING, _WEIGHING])
@pytest.mark.parametrize("row_bytes", [16, 4096, 14336, 65536, 1 << 20])
@pytest.mark.parametrize("num_sms", [1, 24, 48, 132, 148, 1000])
@pytest.mark.parametrize("max_shared_bytes", [99 * 1024, 164 * 1024, H200_SHARED_BYTES])
def test_there_are_warps_and_room_for_them(
    work: _Work, row_bytes: int, num_sms: int, max_shared_bytes: int
) -> None:
    assert 2 <= warps(work, row_bytes, num_sms, max_shared_bytes) <= work.max_warps


def test_no_more_bytes_are_in_flight_than_needed() -> None:
    few = warps(_MOVING, 14336, 24, H200_SHARED_BYTES)
    all_of_them = warps(_MOVING, 14336, 132, H200_SHARED_BYTES)
    assert (few, all_of_them) == (14, 10)
    assert all_of_them * 132 * 14336 <= _BYTES_IN_FLIGHT
    assert warps(_MOVING, 2048, 132, H200_SHARED_BYTES) == 14
