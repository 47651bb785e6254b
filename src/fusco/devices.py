"""GPUs of a group's ranks: whether the CUDA engine can join them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fusco.groups import cuda_backend


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a rank knows of its GPU and of the others that it can see.

    Attributes:
        problem: why the CUDA engine cannot run on this rank; empty: it can.
        device: the rank's GPU, by its UUID; empty where there is none.
        apart: UUIDs of visible GPUs whose memory that GPU cannot reach.
        backend: what sends the group's CUDA tensors, such as "nccl"; empty: nothing.
    """

    problem: str = ""
    device: str = ""
    apart: Sequence[str] = ()
    backend: str = ""


def find_reach(group: dist.ProcessGroup, problem: str) -> Reach:
    """This rank's part; initialises CUDA where there is no problem.

    Args:
        group: the ranks.
        problem: why the engine cannot run in this process, if so.
    """
    backend = cuda_backend(group)
    if problem:
        return Reach(problem=problem, backend=backend)
    current = torch.cuda.current_device()
    others = [index for index in range(torch.cuda.device_count()) if index != current]
    return Reach(
        device=_uuid(current),
        apart=[
            _uuid(index)
            for index in others
            if not torch.cuda.can_device_access_peer(current, index)
        ],
        backend=backend,
    )


def why_not_joined(reaches: Sequence[Reach]) -> str:
    """Why the CUDA engine cannot join these ranks; empty: it can.

    A GPU that a rank cannot see, since each was shown its own alone, is taken to be reached.
    """
    for rank, reach in enumerate(reaches):
        if reach.problem:
            return f"rank {rank} {reach.problem}"
    for rank, reach in enumerate(reaches):
        for peer, other in enumerate(reaches):
            if other.device in reach.apart:
                return f"the GPU of rank {rank} has no access to the memory of rank {peer}'s"
    return ""


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
