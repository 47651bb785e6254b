"""What carries small CPU tensors between the ranks of a group, whatever its backend sends."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch import Tensor

from fusco.groups import group_device_types, group_timeout_s
from fusco.transports.bulletin import Bulletin


class Line(Protocol):
    """What torch's groups and its gloo backend have in common."""

    def rank(self) -> int:
        """Of this process."""

    def size(self) -> int:
        """Number of ranks."""

    def send(self, tensors: list[Tensor], dstRank: int, tag: int, /) -> Any:
        """Begin to send one tensor of the CPU; a `dist.Work`, or None."""

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int, /) -> Any:
        """Begin to fill one."""


@functools.cache
def line_of(group: dist.ProcessGroup) -> Line:
    """The group itself where it sends CPU tensors, else a gloo backend over the group's store.

    That is one for all Shuffles of the group, no group that torch or the user knows, and made by
    all ranks together.
    """
    if "cpu" in group_device_types(group):
        return group
    from torch._C._distributed_c10d import PrefixStore

    timeout_s = group_timeout_s(group)
    bulletin = Bulletin(group, timeout_s)
    store = PrefixStore(f"{bulletin.name}/line", bulletin.store)
    timeout = timedelta(seconds=timeout_s)
    backend: Any = dist.ProcessGroupGloo(store, group.rank(), group.size(), timeout)
    return cast(Line, backend)
