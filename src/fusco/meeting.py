"""How the ranks of a group find out about each other when a Shuffle is made."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from fusco import env
from fusco.devices import Reach, find_reach, why_not_joined
from fusco.engines import probe, why_no_kernels
from fusco.errors import DisagreementError, EngineUnavailableError, InputError, input_error
from fusco.groups import cuda_backend, group_device_types, group_timeout_s, resolve_timeout_s
from fusco.transports.bulletin import Bulletin
from fusco.transports.mailbox import Mailbox


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What ranks have learnt of each other.

    Attributes:
        node_of_rank: the node of each rank, numbered in the order of their first rank.
        engine: the engine to use.
        timeout_s: bound of every wait, seconds.
        channel: a number that no earlier meeting of the group has come to.
    """

    node_of_rank: tuple[int, ...]
    engine: str
    timeout_s: float
    channel: int


def meet(
    operation: str,
    group: dist.ProcessGroup,
    settings: Mapping[str, Any],
    *,
    error: InputError | None = None,
    engine: str,
    ranks_per_node: int | None = None,
    timeout_s: float | None = None,
    without: Sequence[str] = (),
) -> Meeting:
    """Compare settings, find the nodes and choose the engine; collective.

    Args:
        operation: what to call this in errors.
        group: the ranks.
        settings: what must be equal on all ranks; JSON.
        error: what is wrong with this rank's arguments.
        engine: the engine asked for, or "auto".
        ranks_per_node: ranks that share a node, in blocks; None: found by host.
        timeout_s: bound of every wait, seconds; None: the environment's, or the group's.
        without: engines that do not serve this operation.

    Raises:
        InputError: an argument is wrong on some rank.
        DisagreementError: the ranks' settings differ.
        EngineUnavailableError: the engine asked for cannot serve these ranks.
        PeerError: a rank did not come.
    """
    bound_s, node, default_engine = group_timeout_s(group), None, "auto"
    try:
        check_engine(operation, engine)
        bound_s = resolve_timeout_s(operation, timeout_s, bound_s)
        node, default_engine = env.NODE_ID.get(), env.ENGINE.get()
    except InputError as problem:
        error = error or problem
    asked = default_engine if engine == "auto" else engine
    greetings = _swap_greetings(
        operation,
        group,
        {
            "error": str(error or ""),
            "channel": _channels.get(group, 1),
            "settings": {**settings, "engine": asked},
            "host": host_id(),
            "node": node,
            "has_gpu": torch.cuda.is_available(),
            "reach": asdict(_reach(group, asked)),
        },
        bound_s,
    )
    # Also where a rank has tried more often, without the others.
    channel = max(greeting["channel"] for greeting in greetings)
    _channels[group] = channel + 1
    if error is not None:
        raise error
    _compare(operation, greetings)
    hosts = [greeting["host"] for greeting in greetings]
    nodes = [greeting["node"] for greeting in greetings]
    labels = hosts if None in nodes else nodes
    if ranks_per_node is not None:
        labels = [rank // ranks_per_node for rank in range(group.size())]
    return Meeting(
        node_of_rank=_number(labels),
        engine=_choose(operation, group, greetings, labels, without),
        timeout_s=bound_s,
        channel=channel,
    )


_channels: MutableMapping[dist.ProcessGroup, int] = WeakKeyDictionary()
"""The next of each group."""


def check_engine(operation: str, engine: str) -> None:
    """Raise an InputError unless there is such an engine."""
    names = ("auto", *(each.name for each in probe()))
    if engine not in names:
        raise input_error(
            operation,
            "engine",
            got=repr(engine),
            expected=" or ".join(names),
            remedy="see `fusco doctor` for what can run here",
        )


def host_id() -> str:
    """Equal on two ranks only if they can open each other's memory: one kernel, one set of
    process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    pids = Path("/proc/self/ns/pid")
    if boot.exists() and pids.exists():
        return f"{boot.read_text().strip()} {os.readlink(pids)}"
    return socket.gethostname()


def _compare(operation: str, greetings: Sequence[Mapping[str, Any]]) -> None:
    for rank, greeting in enumerate(greetings):
        if greeting["error"]:
            raise InputError(f"rank {rank}: {greeting['error']}")
    for rank, greeting in enumerate(greetings):
        for name, value in greeting["settings"].items():
            first = greetings[0]["settings"][name]
            if value != first:
                raise DisagreementError(
                    f"{operation}: {name}: rank 0 has {first!r}, rank {rank} has {value!r}; "
                    "all ranks must pass the same"
                )


def _reach(group: dist.ProcessGroup, asked: str) -> Reach:
    """What is to be known of this rank's GPU, where an engine for GPUs may be chosen."""
    if asked == "cuda" or (asked in ("auto", "two_level") and cuda_backend(group) == "nccl"):
        if not torch.cuda.is_available():
            return Reach(problem="needs a CUDA device, and torch finds none")
        return find_reach(group, why_no_kernels())
    return Reach(problem="was not asked to use it")


def _choose(
    operation: str,
    group: dist.ProcessGroup,
    greetings: Sequence[Mapping[str, Any]],
    labels: Sequence[object],
    without: Sequence[str],
) -> str:
    """The engine; the same on all ranks, since it follows from their greetings."""
    asked = greetings[0]["settings"]["engine"]
    is_one_host = len({greeting["host"] for greeting in greetings}) == 1
    if asked in ("cpu", "cuda") and not is_one_host:
        raise EngineUnavailableError(
            f"{operation}: engine {asked!r} needs all ranks on one host, where they can open each "
            "other's memory; use engine='two_level' or 'reference' between hosts"
        )
    hosts = [greeting["host"] for greeting in greetings]
    shares_memory = len(set(zip(labels, hosts, strict=True))) == len(set(labels))
    if asked == "two_level" and not shares_memory:
        raise EngineUnavailableError(
            f"{operation}: engine 'two_level' needs the ranks of a node on one host, where they "
            "can open each other's memory; change ranks_per_node or FUSCO_NODE_ID, or use "
            "engine='reference'"
        )
    reaches = [Reach(**greeting["reach"]) for greeting in greetings]
    has_nccl = all(reach.backend == "nccl" for reach in reaches)
    why_no_cuda = _why_no_cuda(operation, greetings, reaches, is_one_host, without)
    why_no_nodes = _why_no_gpu_nodes(reaches, labels) if has_nccl else ""
    if asked == "two_level" and why_no_nodes:
        raise EngineUnavailableError(
            f"{operation}: engine 'two_level' cannot serve these ranks: {why_no_nodes}; change "
            "ranks_per_node or FUSCO_NODE_ID, or use engine='reference'"
        )
    if asked == "cuda" and why_no_cuda:
        raise EngineUnavailableError(
            f"{operation}: engine 'cuda' cannot serve these ranks: {why_no_cuda}; see "
            "`fusco doctor`, or use another engine"
        )
    if asked != "auto":
        return str(asked)
    # Told by the environment, nodes of one host are meant as if they were apart.
    is_apart = not is_one_host or len({greeting["node"] for greeting in greetings}) > 1
    if has_nccl:
        if not is_apart and not why_no_cuda:
            return "cuda"
        # Between nodes GPU tensors are not exchanged in segments either.
        if is_apart and shares_memory and not why_no_nodes and "cuda" not in without:
            return "two_level"
    if "cpu" not in group_device_types(group):
        why_not_apart = _why_not_apart(operation, reaches, labels, shares_memory, without)
        raise EngineUnavailableError(
            f"{operation}: the group sends CUDA tensors only, and no engine for them can serve it: "
            f"{why_not_apart if is_apart else why_no_cuda}; for other engines make the group with "
            "backend='cpu:gloo,cuda:nccl'"
        )
    can_run = [each.name for each in probe() if each.available]
    if not is_apart:
        return "cpu" if "cpu" in can_run else "reference"
    # With GPUs that two_level cannot join, only the reference takes their tensors.
    has_gpu = any(greeting["has_gpu"] for greeting in greetings)
    return "two_level" if "two_level" in can_run and shares_memory and not has_gpu else "reference"


def _why_no_cuda(
    operation: str,
    greetings: Sequence[Mapping[str, Any]],
    reaches: Sequence[Reach],
    is_one_host: bool,
    without: Sequence[str],
) -> str:
    if "cuda" in without:
        return f"it does not serve {operation}"
    if not is_one_host:
        return "the ranks are on several hosts"
    if not all(greetings[0]["settings"].get("ablation", {}).values()):
        return "no mechanism of it can be switched off"
    for rank, reach in enumerate(reaches):
        if why := reach.no_windows or reach.no_kernels:
            return f"rank {rank} {why}"
    return why_not_joined(dict(enumerate(reaches))) or _why_too_many(greetings)


def _why_too_many(greetings: Sequence[Mapping[str, Any]]) -> str:
    from fusco.engines.cuda import CudaEngine

    numbers = {"num_ranks": len(greetings), **greetings[0]["settings"]}
    for name, most in CudaEngine.most.items():
        if numbers.get(name, 0) > most:
            return f"it serves {name} up to {most}, not {numbers[name]}"
    return ""


def _why_not_apart(
    operation: str,
    reaches: Sequence[Reach],
    labels: Sequence[object],
    shares_memory: bool,
    without: Sequence[str],
) -> str:
    if "cuda" in without:
        return f"none that joins hosts serves {operation}"
    if not shares_memory:
        return "the ranks of a node are on several hosts"
    return _why_no_gpu_nodes(reaches, labels) or "not all ranks send them by NCCL"


def _why_no_gpu_nodes(reaches: Sequence[Reach], labels: Sequence[object]) -> str:
    """Why GPUs of some node do not reach each other; empty: they do."""
    nodes: dict[object, dict[int, Reach]] = {}
    for rank, label in enumerate(labels):
        nodes.setdefault(label, {})[rank] = reaches[rank]
    return next((why for mates in nodes.values() if (why := why_not_joined(mates))), "")


def _number(labels: Sequence[object]) -> tuple[int, ...]:
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(label, len(numbers)) for label in labels)


def _swap_greetings(
    operation: str, group: dist.ProcessGroup, mine: Mapping[str, Any], timeout_s: float
) -> list[dict[str, Any]]:
    if "cpu" not in group_device_types(group):
        bulletin = Bulletin(group, timeout_s)
        return [json.loads(text) for text in bulletin.swap(operation, json.dumps(mine))]
    mailbox = Mailbox(group, timeout_s)
    text = json.dumps(mine).encode()
    sizes = torch.empty(group.size(), 1, dtype=torch.int64, device="cpu")
    size = torch.tensor([len(text)], device="cpu")
    mailbox.swap([size] * group.size(), list(sizes.unbind()), operation=operation)
    letter = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    letters = [torch.empty(n, dtype=torch.uint8, device="cpu") for n in sizes[:, 0].tolist()]
    mailbox.swap([letter] * group.size(), letters, operation=operation)
    return [json.loads(each.numpy().tobytes()) for each in letters]
