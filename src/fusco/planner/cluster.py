"""The plan of the whole cluster: the per-rank planner run for every rank, in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusco.legs import Arrival, Counts, Forwarding, Leg
from fusco.planner.counts import count_pairs, sort_pairs
from fusco.planner.legs import shipment
from fusco.planner.plan import Sends, assemble, finish, plan_relay, plan_sends
from fusco.planner.traffic import HopSizes
from fusco.plans import SegmentPlan
from fusco.topology import Topology
from fusco.types import Ablation


def plan_cluster(
    topk_idx: Sequence[Tensor],
    topology: Topology,
    *,
    alignment: int = 1,
    two_level: bool = False,
    ablation: Ablation = Ablation(),  # noqa: B008 - frozen
) -> tuple[list[SegmentPlan], list[Sends]]:
    """Plans of all ranks, what they would hold after the exchanges of a real run.

    Args:
        topk_idx: for each rank int64 `[T, K]`; T may differ, K may not.
        topology: as seen from any rank.
        alignment: every expert's rows are padded to a multiple of it.
        two_level: send through forwarders what goes to other nodes.
        ablation: mechanisms that are switched off.

    Returns:
        plans and sends, one a rank.
    """
    top_k = topk_idx[0].shape[1]
    pairs = [sort_pairs(routing, topology) for routing in topk_idx]
    packed = torch.stack([count_pairs(each, topology) for each in pairs])
    counts = Counts.split(packed, topology.num_experts, topology.num_ranks, topology.num_nodes)
    sends = [
        plan_sends(
            each,
            counts,
            topology.seen_from(rank),
            alignment=alignment,
            two_level=two_level,
            ablation=ablation,
        )
        for rank, each in enumerate(pairs)
    ]
    traffic = sends[0].traffic
    direct = _ship([send.direct for send in sends], traffic.direct)
    levels: list[Forwarding | None] = [None] * topology.num_ranks
    if traffic.forward is not None and traffic.relay is not None:
        forward = [send.forward for send in sends if send.forward is not None]
        received = _ship(forward, traffic.forward)
        relays = [
            plan_relay(arrival, traffic.relay, topology.seen_from(rank), top_k)
            for rank, arrival in enumerate(received)
        ]
        relayed = _ship(relays, traffic.relay)
        levels = [
            Forwarding(send=send, arrival=arrival, relay=relay, relay_arrival=relay_arrival)
            for send, arrival, relay, relay_arrival in zip(
                forward, received, relays, relayed, strict=True
            )
        ]
    identity = torch.zeros(2, dtype=torch.int64, device="cpu")
    plans = [
        finish(identity, sends[rank], direct[rank], levels[rank], rank)
        for rank in range(topology.num_ranks)
    ]
    return plans, sends


def _ship(legs: list[Leg], sizes: HopSizes) -> list[Arrival]:
    return [
        assemble(sizes, rank, [shipment(leg, rank) for leg in legs]) for rank in range(len(legs))
    ]
