"""Bytes over bandwidth: the least time that the links need for a plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusco.planner import Traffic
from fusco.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Bandwidth of each rank's links, bytes a second in each direction.

    Attributes:
        node_bytes_per_s: to the ranks of its node.
        network_bytes_per_s: to other nodes.
    """

    node_bytes_per_s: float
    network_bytes_per_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """What a dispatch moves; its combine moves the same bytes the other way.

    Attributes:
        node_bytes: int64 `[P, P]`, sender and receiver within a node; a rank's own are left out.
        network_bytes: int64 `[P, P]`, sender and receiver on different nodes.
        node_s: seconds of the busiest link within a node.
        network_s: seconds of the busiest link between nodes.
        time_s: seconds of the whole, where the two overlap slice by slice.
    """

    node_bytes: Tensor
    network_bytes: Tensor
    node_s: float
    network_s: float
    time_s: float


def predict(traffic: Traffic, topology: Topology, row_bytes: int, hardware: Hardware) -> Cost:
    """The cost of a dispatch.

    Args:
        traffic: of all ranks, from `planner.measure_traffic` or `planner.plan_cluster`.
        topology: ranks and nodes.
        row_bytes: bytes of a token's row.
        hardware: the links.
    """
    node = topology.tensors(traffic.rows.device).node_of_rank
    is_near = node[:, None] == node
    moved = traffic.direct.segments.clone()
    if traffic.forward is not None and traffic.relay is not None:
        moved += traffic.forward.segments + traffic.relay.segments
    moved = moved.fill_diagonal_(0) * row_bytes
    near, far = moved * is_near, moved * ~is_near
    node_s = _busiest(near) / hardware.node_bytes_per_s
    network_s = _busiest(far) / hardware.network_bytes_per_s
    return Cost(
        node_bytes=near,
        network_bytes=far,
        node_s=node_s,
        network_s=network_s,
        time_s=max(node_s, network_s),
    )


def _busiest(link_bytes: Tensor) -> int:
    """Most bytes that any rank sends or receives."""
    return int(max(link_bytes.sum(dim=0).max(), link_bytes.sum(dim=1).max()))
