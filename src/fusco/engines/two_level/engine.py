"""The two-level engine: a node engine on every node, and slices between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery, Engine, Returned, World
from fusco.engines.mail import swap_segments
from fusco.engines.node import Node
from fusco.engines.segments import check_exchange, exchange_payload
from fusco.engines.sliced import SlicedPlanner
from fusco.engines.two_level.combine import combine
from fusco.engines.two_level.dispatch import dispatch_new, dispatch_planned
from fusco.engines.two_level.session import Session
from fusco.engines.two_level.torch_planner import TorchPlanner
from fusco.layout.records import HEADER
from fusco.layout.segments import bytes_per_row
from fusco.plans import Plan, SlicedPlan
from fusco.types import Segments, Stats

MakeNode = Callable[[World, list[float], tuple[int, ...]], Node]
MakePlanner = Callable[[World], SlicedPlanner]


class TwoLevelEngine(Engine):
    """Ranks of several nodes, over any group that torch.distributed can send messages on.

    Args:
        world: what it is made for.
        make_node: makes the node engine for the ranks given, from `world` and the seconds waited.
        make_planner: makes a planner for the device of that engine.
    """

    name = "two_level"
    plan_type = SlicedPlan

    def __init__(
        self, world: World, make_node: MakeNode, make_planner: MakePlanner = TorchPlanner
    ) -> None:
        super().__init__(world)
        self._session = Session(world, make_node, make_planner, self.meter.wait_s)

    @property
    def device_types(self) -> tuple[str, ...]:
        return (self.device.type,)

    @property
    def device(self) -> torch.device:
        return self._session.node.device

    @property
    def plans_two_levels(self) -> bool:
        return True

    @property
    def epoch(self) -> int:
        return self._session.epoch

    @property
    def is_closed(self) -> bool:
        return self._session.is_closed

    def agree_on_error(self, call: Call) -> None:
        self._session.agree(call)

    def dispatch(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        weights: Tensor | None,
        routing: Tensor | Plan,
    ) -> Delivery:
        if isinstance(routing, SlicedPlan):
            delivery = dispatch_planned(self._session, call, rows, weights, routing)
        else:
            assert isinstance(routing, Tensor), "plans come from this engine"
            delivery, rows_per_rank = dispatch_new(
                self._session, call, rows, weights, routing, self.new_identity
            )
            self.meter.planned(rows_per_rank)
        plan = delivery.plan
        assert isinstance(plan, SlicedPlan)
        num_ranks = self.world.topology.num_ranks
        slots = torch.cat((plan.near.target, plan.received.target))
        sent = torch.bincount(slots, minlength=num_ranks).cpu() + plan.far.peer_ptr.diff()
        self.meter.moved((sent * _total_bytes(rows)).tolist())
        self.meter.dispatched(int(plan.tokens_per_expert.sum()))
        return delivery

    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
        row_values: Tensor | None = None,
    ) -> Returned:
        assert isinstance(plan, SlicedPlan), "plans come from this engine"
        returned = combine(self._session, call, rows, row_weights, plan, row_values)
        num_ranks = self.world.topology.num_ranks
        partials = torch.bincount(plan.partials.target, minlength=num_ranks).cpu()
        sums = partials + plan.received.peer_ptr.diff()
        self.meter.moved((sums * _total_bytes(rows)).tolist())
        self.meter.combined()
        return returned

    def exchange(
        self,
        call: Call,
        source: Tensor,
        send: Sequence[Segments],
        out: Tensor,
        receive: Sequence[Segments],
    ) -> None:
        records = self._session.agree(call, payload=exchange_payload(send, receive))
        check_exchange(records[:, HEADER:], self.world.topology.rank)
        swap_segments(
            self._session.mailbox, source, send, out, receive, operation=call.operation.text
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def stats(self) -> Stats:
        return self.meter.stats(window_bytes=self._session.node.window_bytes)

    @property
    def staging_bytes(self) -> int:
        """The memory of the slices on their way, fixed when the engine is made."""
        return self._session.transport.staging_bytes

    def close(self, lost: int | None = None) -> None:
        self._session.close(lost)


def _total_bytes(rows: Sequence[Tensor]) -> int:
    return sum(bytes_per_row(each) for each in rows)
