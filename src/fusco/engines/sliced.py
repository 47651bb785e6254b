"""What the two-level engine wants planned: a step for each moment at which more is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusco.legs import Arrival, Counts, Leg, Partials
from fusco.planner import HopSizes, Sends, SortedPairs


@dataclass(frozen=True, kw_only=True, eq=False)
class Counted:
    """A rank's routing before it knows anybody else's.

    Attributes:
        topk_idx: int64 `[T, K]`.
        packed: int64 `[E + P + N]`, its counts.
        pairs: sorted, where whoever plans wants them so.
    """

    topk_idx: Tensor
    packed: Tensor
    pairs: SortedPairs | None


class SlicedPlanner(ABC):
    """Pure functions of one rank. `fusco.engines.two_level.plans` and `fusco.planner` say in torch
    what each is; another planner says the same to the bit, faster."""

    @abstractmethod
    def count(self, topk_idx: Tensor) -> Counted:
        """As `planner.count_pairs`."""

    @abstractmethod
    def plan_sends(self, counted: Counted, counts: Counts) -> Sends:
        """As `planner.plan_sends` with two levels."""

    @abstractmethod
    def plan_relay(self, received: Arrival, sizes: HopSizes) -> Leg:
        """As `planner.plan_relay`."""

    @abstractmethod
    def held_lists(self, near: Leg, relay: Leg) -> tuple[Tensor, Tensor]:
        """`held_ptr` and `held` of a `SlicedPlan`."""

    @abstractmethod
    def final_lists(
        self, near: Leg, far: Leg, lanes: Sequence[int], tokens: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        """`final_ptr` and `final` of a `SlicedPlan`.

        Args:
            near: of own tokens to the own node.
            far: of own tokens to forwarders.
            lanes: the forwarders, in the order of their rows in the staging memory.
            tokens: of a slice.
            rows: of a lane in the staging memory.
        """

    @abstractmethod
    def read_partials(
        self, lists: Tensor, near: HopSizes, relay: HopSizes, node: Sequence[int]
    ) -> Partials:
        """`partials` of a `SlicedPlan`.

        Args:
            lists: int64, what each rank of the node tells this one of its own tokens, then of those
                it relays: slots and slice of each segment, then the slots.
            near: sizes, of own tokens.
            relay: sizes, of tokens relayed.
            node: its ranks, ascending.
        """
