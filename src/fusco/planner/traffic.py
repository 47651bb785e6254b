"""How many segments and slots every rank sends every other on each hop, from the counts alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusco.legs import Counts
from fusco.planner.balance import choose_forwarders
from fusco.topology import Topology
from fusco.types import Ablation


@dataclass(frozen=True, kw_only=True, eq=False)
class HopSizes:
    """Sizes of one hop between all ranks, int64 `[P, P]`: sender, receiver."""

    segments: Tensor
    pairs: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """What moves, and what every rank receives in the end.

    Attributes:
        direct: from a token's rank straight to its experts' ranks.
        forward: from a token's rank to the forwarder of another node; None in one-level plans.
        relay: from forwarders to the ranks of their node; None in one-level plans.
        through: int64 `[P, P]`, the rank that receives what rank p sends to rank q of another
            node; None in one-level plans.
        expert_start: int64 `[E]`, the first slot of each expert on its rank, in device-major
            order of experts.
        rows: int64 `[P]`, rows each rank receives, padding counted.
    """

    direct: HopSizes
    forward: HopSizes | None
    relay: HopSizes | None
    through: Tensor | None
    expert_start: Tensor
    rows: Tensor


def measure_traffic(
    counts: Counts,
    topology: Topology,
    *,
    alignment: int,
    two_level: bool,
    ablation: Ablation,
) -> Traffic:
    """Sizes of every hop.

    Args:
        counts: of all ranks.
        topology: ranks, nodes and placement.
        alignment: every expert's rows are padded to a multiple of it.
        two_level: send through forwarders what goes to other nodes. Without deduplication every
            rank is the forwarder of its own rows.
        ablation: mechanisms that are switched off.
    """
    facts = topology.tensors(counts.pairs.device)
    per_place = counts.pairs[:, facts.device_major]
    total = per_place.sum(dim=0)
    padded = torch.div(total + (alignment - 1), alignment, rounding_mode="floor") * alignment
    end = padded.cumsum(0)
    bounds = torch.cat((end.new_zeros(1), end))[facts.first_expert]
    rank_of_place = facts.rank_of_expert[facts.device_major]
    expert_start = end - padded - bounds[rank_of_place]

    num_ranks = topology.num_ranks
    pairs = per_place.new_zeros(num_ranks, num_ranks).index_add_(1, rank_of_place, per_place)
    segments = counts.tokens_to_rank if ablation.deduplicate else pairs
    if not two_level:
        return Traffic(
            direct=HopSizes(segments=segments, pairs=pairs),
            forward=None,
            relay=None,
            through=None,
            expert_start=expert_start,
            rows=bounds.diff(),
        )

    node = facts.node_of_rank
    is_near = node[:, None] == node
    far_segments, far_pairs = segments.masked_fill(is_near, 0), pairs.masked_fill(is_near, 0)
    none = torch.zeros_like(pairs)
    if ablation.deduplicate:
        forwarders = choose_forwarders(counts, topology, balance=ablation.balance)
        through = forwarders[:, node]
        # forwarders[p, n] differ along n, and a rank forwards nothing to itself.
        sent = none.scatter(1, forwarders, counts.tokens_to_node).fill_diagonal_(0)
    else:
        through = torch.arange(num_ranks, device=node.device).expand(num_ranks, num_ranks)
        sent = far_pairs
    forward = HopSizes(segments=sent, pairs=none.scatter_add(1, through, far_pairs))
    relay = HopSizes(
        segments=none.scatter_add(0, through, far_segments),
        pairs=none.scatter_add(0, through, far_pairs),
    )
    return Traffic(
        direct=HopSizes(segments=segments * is_near, pairs=pairs * is_near),
        forward=forward,
        relay=relay,
        through=through,
        expert_start=expert_start,
        rows=bounds.diff(),
    )
