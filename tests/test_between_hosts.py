"""Between hosts: right answers over slow and lossy links, errors in time where one breaks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fusco
from fusco.engines.base import ENGINES
from fusco.engines.two_level import TwoLevelEngine
from fusco.testing.cases import Case, draw, expect, expect_round_trip
from fusco.testing.cluster import Cluster
from fusco.testing.ranks import RankFailure, RankPool

pytestmark = pytest.mark.cluster

# Uneven hosts: the single rank of the last one forwards for both ranks of the others.
HOSTS = (2, 2, 1)
CASE = Case(
    num_tokens=(90, 0, 300, 41, 130),
    hidden_size=512,
    top_k=4,
    num_experts=20,
    dtype=torch.bfloat16,
    ranks_per_node=2,
)
TIMEOUT_S = 4.0
SLACK_S = 12.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(HOSTS, rate="200mbit") as made:
        yield made


@pytest.fixture
def hosts(cluster: Cluster) -> Iterator[RankPool]:
    with RankPool(sum(HOSTS), seats=cluster.seats, timeout_s=90.0, grace_s=20.0) as ranks:
        yield ranks


def shuffle_of(case: Case, **changes: Any) -> fusco.Shuffle:
    """Nodes are found, not told."""
    return case.shuffle(None, "auto", ranks_per_node=None, **changes)


def round_trips(rank: int, case: Case, rounds: int) -> str:
    with shuffle_of(case) as shuffle:
        for number in range(rounds):
            expect_round_trip(shuffle, draw(case, number), rank)
        return shuffle.engine_name


def staging(rank: int) -> set[int]:
    """The ring's size and address do not change with the number of tokens."""
    seen = set()
    for num_tokens in (1, 32768):
        case = replace(CASE, num_tokens=(num_tokens,) * 5, hidden_size=16, routing="repeated")
        with shuffle_of(case, max_tokens=32768) as shuffle:
            expect_round_trip(shuffle, draw(case), rank)
            engine = ENGINES[shuffle._key]
            assert isinstance(engine, TwoLevelEngine)
            seen.add(engine.staging_bytes)
    return seen


def test_hosts_find_each_other_and_agree_with_the_dense_answer(hosts: RankPool) -> None:
    assert hosts.run(round_trips, CASE, 3) == ["two_level"] * 5
    assert all(len(seen) == 1 for seen in hosts.run(staging))


def test_lost_packets_and_a_slow_link_change_no_bit(cluster: Cluster, hosts: RankPool) -> None:
    cluster.slow_down(2, "20mbit")
    hosts.run(round_trips, CASE, 2)
    cluster.slow_down(2, "200mbit")
    for rank in range(5):
        cluster.lose(rank, 0.05)
    hosts.run(round_trips, CASE, 2)


def until_lost(rank: int, begun: Path) -> tuple[int, float, str]:
    """Dispatch and combine until a rank is lost: which, after how long, and what is said.

    Args:
        begun: what to make when the first round has gone well.
    """
    case = replace(CASE, num_tokens=(400,) * 5)
    inputs = draw(case)
    shuffle = shuffle_of(case, timeout_s=TIMEOUT_S)
    for _ in range(10_000):
        began = time.monotonic()
        try:
            expect_round_trip(shuffle, inputs, rank)
            begun.touch()
        except fusco.PeerError as error:
            took_s = time.monotonic() - began
            expect(f"rank {error.rank}" in str(error), "the text names the rank")
            return error.rank, took_s, str(error)
    raise AssertionError("nobody was lost")


@contextlib.contextmanager
def broken_after(begun: Path, fault: Callable[[], None]) -> Iterator[None]:
    """Something breaks within the rounds that follow the first."""

    def wait_and_break() -> None:
        while not begun.exists() and not is_over.wait(0.02):
            pass
        if not is_over.wait(0.5):
            fault()

    is_over = threading.Event()
    thread = threading.Thread(target=wait_and_break)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_a_cut_link_is_an_error_in_time(cluster: Cluster, hosts: RankPool, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with broken_after(begun, lambda: cluster.cut(2)):
        found = hosts.run(until_lost, begun)
    for _, took_s, text in found:
        assert took_s < TIMEOUT_S + SLACK_S, text
    # The rank that is cut off sees all others fall silent, and one that waits for a rank which
    # itself waits may be the first to give up.
    assert [lost for lost, _, _ in found].count(2) >= 2, found


def test_a_killed_host_is_named_by_all_survivors(hosts: RankPool, tmp_path: Path) -> None:
    begun, pids = tmp_path / "begun", hosts.pids[2:4]

    def kill() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    with broken_after(begun, kill), pytest.raises(RankFailure) as caught:
        hosts.run(until_lost, begun)
    assert sorted(caught.value.errors) == [2, 3]
    for lost, took_s, text in caught.value.results.values():
        assert lost in (2, 3), text
        assert took_s < TIMEOUT_S + SLACK_S, text
