"""Ranks that have exchanged differently often elsewhere still meet."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from fusco.transports.renumbered import RenumberedStore


def renumbered(path: Path) -> RenumberedStore:
    """One rank's store."""
    return RenumberedStore(dist.FileStore(str(path), 2), timeout_s=0.2)


def test_numbers_of_processes_do_not_matter(tmp_path: Path) -> None:
    stores = [renumbered(tmp_path / "store") for _ in range(2)]
    # As C++ code sees them.
    one, other = (dist.PrefixStore("", store) for store in stores)
    for turn in range(3):
        one.set(f"memory/{100 + 2 * turn}/0", f"one {turn}")
        other.set(f"memory/{turn}/1", f"other {turn}")
        other.wait([f"memory/{turn}/0"], timedelta(seconds=5))
        assert other.get(f"memory/{turn}/0") == f"one {turn}".encode()
        assert one.get(f"memory/{100 + 2 * turn}/1") == f"other {turn}".encode()


def test_a_wait_is_bounded(tmp_path: Path) -> None:
    store = renumbered(tmp_path / "store")
    one = dist.PrefixStore("", store)
    with pytest.raises(RuntimeError):
        one.wait(["memory/5/1"], timedelta(milliseconds=100))
    with pytest.raises(RuntimeError):
        one.wait(["memory/5/1"])
