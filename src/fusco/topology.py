"""Who is where: ranks, nodes, and the rank of every expert."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Ranks and nodes of a group, and where its experts live.

    Attributes:
        rank: this rank, in its group.
        node_of_rank: the node of each rank; nodes are numbered from 0 in the order of their
            first rank.
        rank_of_expert: the rank of each expert. A rank's local experts are in ascending order.
    """

    rank: int
    node_of_rank: tuple[int, ...]
    rank_of_expert: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_experts(self) -> int:
        return len(self.rank_of_expert)

    @cached_property
    def num_nodes(self) -> int:
        return max(self.node_of_rank) + 1

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.node_of_rank[self.rank]

    @cached_property
    def num_local_experts(self) -> tuple[int, ...]:
        """How many experts each rank holds."""
        counts = Counter(self.rank_of_expert)
        return tuple(counts[rank] for rank in range(self.num_ranks))

    @property
    def first_local(self) -> int:
        """Where this rank's experts begin when experts are sorted by (rank, id)."""
        return sum(self.num_local_experts[: self.rank])

    @cached_property
    def _by_device(self) -> dict[str, TopologyTensors]:
        return {}

    def tensors(self, device: torch.device | str) -> TopologyTensors:
        """The same facts as tensors on `device`, made once a device."""
        key = str(device)
        if key not in self._by_device:
            self._by_device[key] = TopologyTensors.of(self, torch.device(device))
        return self._by_device[key]

    def seen_from(self, rank: int) -> Topology:
        """The same group as another of its ranks sees it."""
        return Topology(
            rank=rank, node_of_rank=self.node_of_rank, rank_of_expert=self.rank_of_expert
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TopologyTensors:
    """A topology's maps as int64 tensors on one device.

    An *order* is the position of a rank when ranks are sorted by (node, rank), in which partial
    sums are added. Tables by order or expert end with an entry for "no expert", which index -1
    finds too.

    Attributes:
        rank_of_expert: `[E]`.
        node_of_rank: `[P]`.
        order_of_rank: `[P]`.
        order_of_expert: `[E + 1]`, the last is P.
        rank_of_order: `[P + 1]`, the last is P.
        node_of_order: `[P + 1]`, the last is N.
        device_major: `[E]`, the experts sorted by (rank, id).
        place_of_expert: `[E + 1]`, the position of each expert in `device_major`; the last is E.
        first_expert: `[P + 1]`, where each rank's experts begin in `device_major`.
    """

    rank_of_expert: Tensor
    node_of_rank: Tensor
    order_of_rank: Tensor
    order_of_expert: Tensor
    rank_of_order: Tensor
    node_of_order: Tensor
    device_major: Tensor
    place_of_expert: Tensor
    first_expert: Tensor

    @classmethod
    def of(cls, topology: Topology, device: torch.device) -> TopologyTensors:
        rank_of_expert = torch.tensor(topology.rank_of_expert, dtype=torch.int64, device="cpu")
        node_of_rank = torch.tensor(topology.node_of_rank, dtype=torch.int64, device="cpu")
        rank_of_order = torch.argsort(node_of_rank, stable=True)
        order_of_rank = torch.argsort(rank_of_order)
        device_major = torch.argsort(rank_of_expert, stable=True)
        counts = torch.bincount(rank_of_expert, minlength=topology.num_ranks)
        tables = cls(
            rank_of_expert=rank_of_expert,
            node_of_rank=node_of_rank,
            order_of_rank=order_of_rank,
            order_of_expert=_append(order_of_rank[rank_of_expert], topology.num_ranks),
            rank_of_order=_append(rank_of_order, topology.num_ranks),
            node_of_order=_append(node_of_rank[rank_of_order], topology.num_nodes),
            device_major=device_major,
            place_of_expert=_append(torch.argsort(device_major), topology.num_experts),
            first_expert=torch.cat((counts.new_zeros(1), counts.cumsum(0))),
        )
        return cls(**{name: table.to(device) for name, table in vars(tables).items()})


def _append(table: Tensor, value: int) -> Tensor:
    return torch.cat((table, table.new_tensor([value])))


def contiguous_placement(num_experts: int, num_ranks: int) -> tuple[int, ...]:
    """Equal contiguous blocks of experts; `num_experts` must be a multiple of `num_ranks`."""
    per_rank = num_experts // num_ranks
    return tuple(expert // per_rank for expert in range(num_experts))
