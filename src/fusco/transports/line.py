"""What carries small CPU tensors between the ranks of a group, whatever its backend sends."""

from __future__ import annotations

from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from fusco.errors import EngineUnavailableError
from fusco.groups import group_device_types, group_timeout_s
from fusco.transports.bulletin import Bulletin

_NUM_CHANNELS = 1 << 15  # gloo takes tags below 2**31


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


def line_of(group: dist.ProcessGroup, timeout_s: float | None = None) -> Line:
    """The group itself where it sends CPU tensors, else a gloo backend over the group's store.

    That is one for all Shuffles of the group, no group that torch or the user knows, made by all
    ranks together when it is first asked for, and gone with the group.

    Args:
        group: the ranks.
        timeout_s: bound of making it, seconds; None: the group's timeout.

    Raises:
        EngineUnavailableError: the ranks do not reach each other by gloo.
    """
    if "cpu" in group_device_types(group):
        return group
    if group not in LINES:
        LINES[group] = _connect(group, timeout_s or group_timeout_s(group))
    return LINES[group]


def tag_of(kind: int, channel: int) -> int:
    """What tells messages apart.

    Args:
        kind: of the messages, below 2**16.
        channel: a number of the Shuffle that sends them; 0 where none does.
    """
    return channel % _NUM_CHANNELS << 16 | kind


def _connect(group: dist.ProcessGroup, timeout_s: float) -> Line:
    from torch._C._distributed_c10d import PrefixStore

    bulletin = Bulletin(group, timeout_s)
    store = PrefixStore(f"{bulletin.name}/line", bulletin.store)
    timeout = timedelta(seconds=timeout_s)
    try:
        backend: Any = dist.ProcessGroupGloo(store, group.rank(), group.size(), timeout)
    except RuntimeError as error:
        raise EngineUnavailableError(
            "Shuffle: the group sends CUDA tensors only, and its ranks cannot join by gloo within "
            f"{timeout_s:g} s for what is told beside them: {error}; set GLOO_SOCKET_IFNAME on "
            "every rank to the network interface that reaches the others, such as eth0"
        ) from error
    return cast(Line, backend)


LINES: MutableMapping[dist.ProcessGroup, Line] = WeakKeyDictionary()
"""Of groups that send no CPU tensors. A line does not hold its group."""
