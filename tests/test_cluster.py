"""The test cluster: links are shaped, counted and broken as told, and nothing stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fusco.errors import InputError
from fusco.testing.cluster import Cluster, bytes_per_second
from fusco.testing.ranks import RankPool

NAMED = Path("/run/netns")
MEGABYTES = 4


def send(rank: int, source: int, target: int) -> float:
    """Move some megabytes from one rank to another; the seconds that took this rank."""
    data = torch.ones(MEGABYTES << 20, dtype=torch.uint8)
    dist.barrier()
    begin = time.monotonic()
    if rank == source:
        dist.send(data, target)
    elif rank == target:
        dist.recv(data.zero_(), source)
        assert data.all()
    return time.monotonic() - begin


def listen(rank: int) -> str:
    del rank
    return socket.if_indextoname(1) + os.environ["FUSCO_NODE_ID"]


@pytest.mark.cluster
def test_links_are_shaped_counted_and_lossy() -> None:
    with (
        Cluster((2, 1), rate="200mbit") as cluster,
        RankPool(3, seats=cluster.seats, timeout_s=60.0) as pool,
    ):
        assert pool.run(listen) == ["lo0", "lo0", "lo1"]
        num_bytes, least_s = MEGABYTES << 20, (MEGABYTES << 20) / bytes_per_second("200mbit")
        before = cluster.link_bytes()
        far_s = pool.run(send, 1, 2)[2]
        moved = cluster.link_bytes().since(before)
        assert far_s > 0.9 * least_s
        assert num_bytes < moved.sent[1] < 1.05 * num_bytes
        assert num_bytes < moved.received[2] < 1.05 * num_bytes
        assert moved.sent[0] < 0.01 * num_bytes

        before = cluster.link_bytes()
        pool.run(send, 0, 1)
        assert max(cluster.link_bytes().since(before).sent) < 0.01 * num_bytes

        cluster.slow_down(2, "50mbit")
        assert pool.run(send, 1, 2)[2] > 3.6 * least_s
        cluster.slow_down(2, "200mbit")
        before = cluster.link_bytes()
        # One send is some 64 packets, of which none may be lost.
        cluster.lose(2, 0.05)
        for _ in range(4):
            pool.run(send, 1, 2)
        assert cluster.link_bytes().since(before).sent[1] > 4 * 1.01 * num_bytes


@pytest.mark.cluster
def test_what_a_crash_left_is_removed() -> None:
    process = multiprocessing.get_context("spawn").Process(target=_crash)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    stale = f"fusco-{process.pid}-"
    assert any(name.startswith(stale) for name in os.listdir(NAMED))
    with Cluster((1, 1), rate="1gbit"):
        names = os.listdir(NAMED)
        assert not any(name.startswith(stale) for name in names)
        assert sum(name.startswith(f"fusco-{os.getpid()}-") for name in names) == 3
    assert not any(name.startswith(f"fusco-{os.getpid()}-") for name in os.listdir(NAMED))


def _crash() -> None:
    Cluster((1,), rate="1gbit").__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.cluster
def test_bad_rates_and_users_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for rate in ("fast", "0mbit", "400", "-1gbit"):
        with pytest.raises(InputError, match="cluster: nic: got"):
            Cluster((1,), rate=rate)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(InputError, match="cluster: hosts: got 1 without root rights"):
        Cluster((1,), rate="1gbit")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(InputError, match="without ip and tc"):
        Cluster((1,), rate="1gbit")
