"""Where a rank's tensors are, and how its time is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fusco.bench.clock import Clock, DeviceBarrier, EventClock, HostClock
from fusco.bench.config import BenchConfig
from fusco.bench.meters import CopyMeter, LinkMeter, Meter


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one rank.

    Attributes:
        device: of its tensors.
        clocks: by mode.
        has_nccl: whether NCCL serves the ranks.
    """

    device: torch.device
    clocks: Mapping[str, Clock]
    has_nccl: bool

    def make_meters(self) -> dict[str, Meter]:
        """What the floor is measured with; collective."""
        meters: dict[str, Meter] = {"memory": CopyMeter(self.device)}
        if self.device.type == "cuda":
            meters["link"] = LinkMeter(self.device)
        return meters


def find_place(config: BenchConfig) -> Place:
    """This rank's; collective."""
    if config.device == "cpu":
        clocks = dict.fromkeys(("eager", "in place"), HostClock())
        return Place(device=torch.device("cpu"), clocks=clocks, has_nccl=False)
    device = torch.device("cuda", torch.cuda.current_device())
    # By its own name: a rank that is shown one GPU only calls it number 0.
    mine = str(torch.cuda.get_device_properties(device).uuid)
    gpus: list[Any] = [None] * config.num_ranks
    dist.all_gather_object(gpus, mine)
    has_own_gpu = len(set(gpus)) == len(gpus)
    barrier = DeviceBarrier(device) if has_own_gpu else None
    queued = EventClock(barrier, has_head_start=True)
    eager = EventClock(barrier, has_head_start=False)
    return Place(
        device=device,
        clocks={
            **dict.fromkeys(("eager", "static eager"), eager),
            **dict.fromkeys(("queued", "static", "graph", "in place"), queued),
        },
        has_nccl=has_own_gpu,
    )
