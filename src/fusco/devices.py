"""GPUs of a group's ranks: whether they can be joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fusco.groups import cuda_backend


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a rank knows of its GPU and of the others that it can see.

    Attributes:
        problem: why no GPU can be used on this rank; empty: one can.
        no_kernels: why the kernels of the CUDA engine cannot run there; empty: they can.
        no_windows: why there is no memory that other ranks' GPUs reach; empty: there is.
        device: the rank's GPU, by its UUID; empty where there is none.
        apart: UUIDs of visible GPUs whose memory that GPU cannot reach.
        backend: what sends the group's CUDA tensors, such as "nccl"; empty: nothing.
    """

    problem: str = ""
    no_kernels: str = ""
    no_windows: str = ""
    device: str = ""
    apart: Sequence[str] = ()
    backend: str = ""


def find_reach(group: dist.ProcessGroup, no_kernels: str) -> Reach:
    """This rank's part; initialises CUDA.

    Args:
        group: the ranks.
        no_kernels: why kernels cannot run in this process, if so.
    """
    backend = cuda_backend(group)
    current = torch.cuda.current_device()
    others = [index for index in range(torch.cuda.device_count()) if index != current]
    return Reach(
        no_kernels=no_kernels,
        no_windows=why_no_windows(),
        device=_uuid(current),
        apart=[
            _uuid(index)
            for index in others
            if not torch.cuda.can_device_access_peer(current, index)
        ],
        backend=backend,
    )


def why_no_windows() -> str:
    """Why this process cannot share memory of its GPU; empty: it can."""
    if torch.cuda.get_allocator_backend() != "cudaMallocAsync":
        return ""
    return (
        "needs torch's symmetric memory, which does not go with its allocator cudaMallocAsync: "
        "take that out of PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF"
    )


def why_not_joined(reaches: Mapping[int, Reach]) -> str:
    """Why the GPUs of these ranks do not reach each other's memory; empty: they do.

    A GPU that a rank cannot see, since each was shown its own alone, is taken to be reached.
    """
    for rank, reach in reaches.items():
        if reach.problem:
            return f"rank {rank} {reach.problem}"
        if reach.no_windows and len(reaches) > 1:
            return f"rank {rank} {reach.no_windows}"
    for rank, reach in reaches.items():
        for peer, other in reaches.items():
            if other.device in reach.apart:
                return f"the GPU of rank {rank} has no access to the memory of rank {peer}'s"
    return ""


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
