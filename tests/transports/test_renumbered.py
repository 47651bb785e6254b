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


def test_after_an_exchange_that_failed_on_one_rank(tmp_path: Path) -> None:
    stores = [renumbered(tmp_path / "store") for _ in range(2)]
    one, other = (dist.PrefixStore("", store) for store in stores)
    for store in stores:
        store.begin_round()
    one.set("memory/0/0", "one before")
    one.set("memory/1/0", "the other never comes so far")
    other.set("memory/0/1", "other before")
    for store in stores:
        store.begin_round()
    one.set("memory/2/0", "one")
    other.set("memory/1/1", "other")
    other.wait(["memory/1/0"], timedelta(seconds=5))
    assert other.get("memory/1/0") == b"one"
    assert one.get("memory/2/1") == b"other"
