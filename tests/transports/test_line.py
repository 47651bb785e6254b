"""Small messages where a group sends none of the CPU: a line of its own, over its store."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist

from fusco.testing.ranks import RankPool
from fusco.transports import line
from fusco.transports.mailbox import Mailbox
from fusco.transports.notices import notices_of
from fusco.transports.progress import Progress

MEMBERS = (1, 2, 4)


def share_over_line(rank: int) -> list[int]:
    """Over a group of some ranks that claims to send CUDA tensors only."""
    # A group of its own: others may have been asked before what they send.
    group = dist.new_group(list(MEMBERS))
    if rank not in MEMBERS:
        return []
    num_groups = len(dist.distributed_c10d._world.pg_map)
    with mock.patch.object(line, "group_device_types", return_value=("cuda",)):
        made = line.line_of(group)
        assert made is not group
        assert line.line_of(group) is made
        mailbox = Mailbox(group, 10.0)
        notices_of(group)
        got = mailbox.share(torch.tensor([rank]), range(len(MEMBERS)), operation="test")
    assert len(dist.distributed_c10d._world.pg_map) == num_groups
    return got[:, 0].tolist()


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
