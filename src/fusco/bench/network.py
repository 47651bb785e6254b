"""What goes over the links of a test cluster, from the links' own counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from fusco.bench.config import BenchConfig
from fusco.testing.cluster import CONGESTION_CONTROL, bytes_per_second
from fusco.testing.namespaces import queue_bytes
from fusco.testing.ranks import Seat


@dataclass(frozen=True, kw_only=True)
class LinkUse:
    """Bytes over one rank's link: sent and received as counted, and those of the plan's rows.

    `planned` is of what it sends; None where it is not known.
    """

    sent: float
    received: float
    planned: float | None

    def since(self, before: LinkUse, times: int) -> LinkUse:
        """The mean of `times` repetitions, since `before`."""
        planned = None
        if self.planned is not None and before.planned is not None:
            planned = (self.planned - before.planned) / times
        return LinkUse(
            sent=(self.sent - before.sent) / times,
            received=(self.received - before.received) / times,
            planned=planned,
        )

    def __add__(self, other: LinkUse) -> LinkUse:
        return LinkUse(
            sent=self.sent + other.sent,
            received=self.received + other.received,
            planned=None if self.planned is None else self.planned + (other.planned or 0),
        )


def read_link(seat: Seat, planned: float | None) -> LinkUse:
    """The counters of this rank's link, when all ranks are done with what they did; collective."""
    dist.barrier()
    return LinkUse(
        sent=queue_bytes(seat.namespace, seat.interface),
        received=queue_bytes(seat.switch, seat.port),
        planned=planned,
    )


def network_facts(config: BenchConfig, uses: Sequence[LinkUse], p50_ms: float) -> dict[str, Any]:
    """What a record says of the network, from one operation's use of every rank's link.

    - `hosts`, `nic`, `congestion_control`: the test cluster.
    - `link_bytes`: over all links, headers and acknowledgements counted.
    - `plan_bytes`: of the rows that the plan sends to other nodes; of fusco only.
    - `busiest_bytes`: over the busiest link, in its busier direction.
    - `link_fraction`: the time that link needs for them, over the time the operation takes.
    """
    assert config.nic is not None
    busiest = max(max(use.sent, use.received) for use in uses)
    planned = [use.planned for use in uses if use.planned is not None]
    return {
        "hosts": config.num_hosts,
        "nic": config.nic,
        "congestion_control": CONGESTION_CONTROL,
        "link_bytes": round(sum(use.sent for use in uses)),
        "plan_bytes": round(sum(planned)) if planned else None,
        "busiest_bytes": round(busiest),
        "link_fraction": float(f"{busiest / bytes_per_second(config.nic) * 1e3 / p50_ms:.4g}"),
    }
