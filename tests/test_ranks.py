"""The pool of ranks that the other tests stand on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fusco.testing.ranks import RankFailure, RankPool, subgroup


def sum_of_ranks(rank: int, members: tuple[int, ...]) -> int | None:
    group = subgroup(members)
    if group is None:
        return None
    total = torch.tensor([rank])
    dist.all_reduce(total, group=group)
    return int(total)


def raise_on(rank: int, culprit: int) -> int:
    if rank == culprit:
        raise KeyError(f"rank {rank}")
    return rank


def kill_on(rank: int, culprit: int, signal_: int) -> int:
    if rank == culprit:
        os.kill(os.getpid(), signal_)
    return rank


def test_groups_and_subgroups_reduce(pool: RankPool) -> None:
    assert pool.run(sum_of_ranks, tuple(range(8))) == [28] * 8
    assert pool.run(sum_of_ranks, (2, 5)) == [None, None, 7, None, None, 7, None, None]
    assert pool.run(sum_of_ranks, (2, 5)) == [None, None, 7, None, None, 7, None, None]


def test_failures_are_told_apart_and_the_pool_starts_again() -> None:
    with RankPool(2, timeout_s=60.0, grace_s=30.0) as ranks:
        with pytest.raises(RankFailure, match="rank 1: KeyError: 'rank 1'") as raised:
            ranks.run(raise_on, 1)
        assert raised.value.results == {0: 0}
        assert "raise_on" in raised.value.errors[1].traceback

        with pytest.raises(RankFailure, match=r"rank 0: RankDied: .* exit code -9"):
            ranks.run(kill_on, 0, signal.SIGKILL)
        pids = ranks.pids
        assert pids == ()

        assert ranks.run(sum_of_ranks, (0, 1)) == [1, 1]
        started = time.monotonic()
        ranks.timeout_s = 2.0
        with pytest.raises(RankFailure, match="rank 1: TimeoutError"):
            ranks.run(kill_on, 1, signal.SIGSTOP)
        assert time.monotonic() - started < 20


def test_workers_end_with_the_pool_and_leave_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with RankPool(2) as ranks:
        assert ranks.run(sum_of_ranks, (0, 1)) == [1, 1]
        pids = ranks.pids
        assert not list(tmp_path.iterdir())
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
