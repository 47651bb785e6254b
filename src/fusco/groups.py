"""Process groups and their timeouts, in the forms that torch.distributed offers."""

from __future__ import annotations

from numbers import Real

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fusco import env
from fusco.errors import InputError, input_error

_LONGEST_S = 1e9
"""Thirty years: clocks count nanoseconds in 64 bits."""


def resolve_group(
    operation: str, group: dist.ProcessGroup | DeviceMesh | None
) -> dist.ProcessGroup:
    """The group meant: the default one, the one given, or that of a one-dimensional mesh.

    Raises:
        InputError: there is no default group, or it is something else.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim == 1:
            return group.get_group()
        raise _bad_group(
            operation,
            f"a DeviceMesh of {group.ndim} dimensions",
            "a one-dimensional DeviceMesh",
            "pass one of its dimensions, such as mesh['ep']",
        )
    if group is not None:
        raise _bad_group(
            operation,
            type(group).__name__,
            "a ProcessGroup that this rank is in, a DeviceMesh or None",
            "pass the result of torch.distributed.new_group on its members",
        )
    if not dist.is_initialized() or dist.group.WORLD is None:
        raise _bad_group(
            operation,
            "None without a default group",
            "an initialised torch.distributed",
            "call torch.distributed.init_process_group first, for example under torchrun",
        )
    return dist.group.WORLD


def group_device_types(group: dist.ProcessGroup) -> tuple[str, ...]:
    """Kinds of device whose tensors the group can send."""
    # NOTE: torch offers no public way to ask.
    return tuple(device.type for device in group._device_types)


def cuda_backend(group: dist.ProcessGroup) -> str:
    """What sends the group's CUDA tensors, such as "nccl"; empty where nothing does."""
    if "cuda" not in group_device_types(group):
        return ""
    return str(group._get_backend(torch.device("cuda")).name())


def group_timeout_s(group: dist.ProcessGroup) -> float:
    """The timeout that the group was made with, seconds."""
    # NOTE: torch has a public setter for it and no getter.
    backend = group._get_backend(group._device_types[0])
    return float(backend.options._timeout.total_seconds())


def _bad_group(operation: str, got: str, expected: str, remedy: str) -> InputError:
    return input_error(operation, "group", got=got, expected=expected, remedy=remedy)


def resolve_timeout_s(operation: str, timeout_s: float | None, default_s: float) -> float:
    """The bound of every wait: the argument, the environment's, or the group's.

    Raises:
        InputError: it is not a positive number, or longer than clocks can count.
    """
    if timeout_s is None:
        timeout_s = env.TIMEOUT_S.get()
    if timeout_s is None:
        return default_s
    if not isinstance(timeout_s, Real) or not 0 < timeout_s <= _LONGEST_S:
        raise input_error(
            operation,
            "timeout_s",
            got=repr(timeout_s),
            expected=f"a number of seconds above 0 and at most {_LONGEST_S:g}, or None",
            remedy="None takes the group's timeout",
        )
    return float(timeout_s)
