"""The planner of any device: what `SlicedPlanner` wants, said in torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusco.engines.base import World
from fusco.engines.sliced import Counted, SlicedPlanner
from fusco.engines.two_level.plans import final_lists, held_lists, read_partials
from fusco.legs import Arrival, Counts, Leg, Partials
from fusco.planner import HopSizes, Sends, count_pairs, plan_relay, plan_sends, sort_pairs


class TorchPlanner(SlicedPlanner):
    """The specification of every other."""

    def __init__(self, world: World) -> None:
        self._world = world

    def count(self, topk_idx: Tensor) -> Counted:
        pairs = sort_pairs(topk_idx, self._world.topology)
        packed = count_pairs(pairs, self._world.topology)
        return Counted(topk_idx=topk_idx, packed=packed, pairs=pairs)

    def plan_sends(self, counted: Counted, counts: Counts) -> Sends:
        assert counted.pairs is not None
        return plan_sends(
            counted.pairs,
            counts,
            self._world.topology,
            alignment=self._world.alignment,
            two_level=True,
            ablation=self._world.ablation,
        )

    def plan_relay(self, received: Arrival, sizes: HopSizes) -> Leg:
        return plan_relay(received, sizes, self._world.topology, self._world.top_k)

    def held_lists(self, near: Leg, relay: Leg) -> tuple[Tensor, Tensor]:
        return held_lists(near, relay)

    def final_lists(
        self, near: Leg, far: Leg, lanes: Sequence[int], tokens: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        return final_lists(near, far, lanes, tokens, rows)

    def read_partials(
        self, lists: Tensor, near: HopSizes, relay: HopSizes, node: Sequence[int]
    ) -> Partials:
        return read_partials(lists, near, relay, node, self._world.topology.rank)
