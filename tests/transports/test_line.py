"""Small messages where a group sends none of the CPU: a line of its own, over its store."""

from __future__ import annotations

import gc
import os
import time
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fusco
from fusco.engines.two_level.letters import Letters
from fusco.testing.ranks import RankPool, subgroup
from fusco.transports import line
from fusco.transports.mailbox import Mailbox
from fusco.transports.notices import notices_of
from fusco.transports.progress import Progress

MEMBERS = (1, 2, 4)


def cuda_only(group: dist.ProcessGroup) -> tuple[str, ...]:
    """Keeps no group, as a mock would."""
    return ("cuda",)


def share_over_line(rank: int) -> list[int]:
    """Over a group of some ranks that claims to send CUDA tensors only."""
    # A group of its own: others may have been asked before what they send.
    group = dist.new_group(list(MEMBERS))
    if rank not in MEMBERS:
        return []
    num_groups = len(dist.distributed_c10d._world.pg_map)
    with mock.patch.object(line, "group_device_types", cuda_only):
        made = line.line_of(group)
        assert made is not group
        assert line.line_of(group) is made
        mailbox = Mailbox(group, 10.0)
        notices_of(group)
        got = mailbox.share(torch.tensor([rank]), range(len(MEMBERS)), operation="test")
        assert len(dist.distributed_c10d._world.pg_map) == num_groups
        kept = weakref.ref(group)
        # All have heard all before the first hangs up.
        mailbox.share(torch.tensor([rank]), range(len(MEMBERS)), operation="test")
        dist.barrier(group)
        num_lines = len(line.LINES)
        dist.destroy_process_group(group)
        del group, made, mailbox
        gc.collect()
        assert kept() is None
        assert len(line.LINES) == num_lines - 1
    return got[:, 0].tolist()


def fail_to_make_a_line(rank: int) -> str:
    """Where this host's name leads nowhere."""
    group = dist.group.WORLD
    assert group is not None
    elsewhere = {"GLOO_SOCKET_IFNAME": "nowhere0"}
    with (
        mock.patch.object(line, "group_device_types", cuda_only),
        mock.patch.dict(os.environ, elsewhere),
    ):
        begin_s = time.monotonic()
        with pytest.raises(fusco.EngineUnavailableError, match="GLOO_SOCKET_IFNAME") as found:
            Mailbox(group, 1.0)
        assert time.monotonic() - begin_s < 60
    return str(found.value)


def test_a_line_that_cannot_be_made(pool: RankPool) -> None:
    assert all("within 1 s" in text for text in pool.run(fail_to_make_a_line))


def hear_late(rank: int) -> float:
    """What is sent long after it was begun to be expected; seconds."""
    group = subgroup((0, 1))
    if group is None:
        return 0.0
    mailbox = Mailbox(group, 5.0)
    letter = torch.zeros(1, dtype=torch.int64)
    nothing = torch.empty(0)
    letters = Letters(mailbox, [nothing, letter] if rank == 0 else [nothing, nothing], "test")
    progress = Progress(mailbox, [1 - rank], "test")
    progress.reach(0)
    time.sleep(5.5)
    if rank == 1:
        time.sleep(0.5)
        letters.send([torch.tensor([7]), nothing])
    letters.wait()
    progress.finish()
    return float(letter)


def test_a_wait_is_bounded_from_when_it_begins(pool: RankPool) -> None:
    assert pool.run(hear_late)[:2] == [7.0, 0.0]


def test_a_group_without_cpu_tensors_gets_a_line(pool: RankPool) -> None:
    got = pool.run(share_over_line)
    assert [each for rank, each in enumerate(got) if rank in MEMBERS] == [list(MEMBERS)] * 3


def go_through_steps(rank: int) -> list[int]:
    """Rank r has r steps; whoever waits for more is let go when r has finished."""
    group = dist.group.WORLD
    assert group is not None
    mates = [mate for mate in range(group.size()) if mate != rank]
    mailbox = Mailbox(group, 30.0)
    seen = []
    for _ in range(2):
        progress = Progress(mailbox, mates, "test")
        for step in range(rank):
            progress.reach(step)
            progress.wait(step)
            seen.append(step)
        progress.finish()
    return seen


def test_ranks_with_unlike_numbers_of_steps(pool: RankPool) -> None:
    assert pool.run(go_through_steps) == [[*range(rank)] * 2 for rank in range(pool.num_ranks)]
