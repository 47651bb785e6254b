"""Ranks that have exchanged differently often elsewhere still meet."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from fusco.transports.renumbered import RenumberedStore


def view(path: Path) -> dist.PrefixStore:
    """What C++ code sees of one rank's store."""
    store = dist.FileStore(str(path), 2)  # type: ignore[attr-defined]
    return dist.PrefixStore("", RenumberedStore(store))  # type: ignore[attr-defined]


def test_numbers_of_processes_do_not_matter(tmp_path: Path) -> None:
    one, other = view(tmp_path / "store"), view(tmp_path / "store")
    for turn in range(3):
        one.set(f"memory/{100 + 2 * turn}/0", f"one {turn}")
        other.set(f"memory/{turn}/1", f"other {turn}")
        other.wait([f"memory/{turn}/0"], timedelta(seconds=5))
        assert other.get(f"memory/{turn}/0") == f"one {turn}".encode()
        assert one.get(f"memory/{100 + 2 * turn}/1") == f"other {turn}".encode()


def test_a_wait_is_bounded(tmp_path: Path) -> None:
    one = view(tmp_path / "store")
    with pytest.raises(RuntimeError):
        one.wait(["memory/5/1"], timedelta(milliseconds=200))
