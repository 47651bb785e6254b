"""The reference engine: executes plans of one and two levels with plain messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery, Engine, Returned, World
from fusco.engines.mail import share_records, swap_segments
from fusco.engines.reference.hops import Hop, ship_slots
from fusco.engines.reference.sums import node_sums, partial_sums
from fusco.engines.segments import check_exchange, exchange_payload
from fusco.groups import group_device_types
from fusco.layout.records import HEADER
from fusco.layout.segments import as_segments, bytes_per_row, from_segments
from fusco.legs import Counts, Forwarding
from fusco.planner import count_pairs, plan_relay, plan_sends, sort_pairs
from fusco.planner.plan import finish
from fusco.plans import Plan, SegmentPlan
from fusco.profiling import stage
from fusco.transports.mailbox import Mailbox
from fusco.types import Segments, Stats


class ReferenceEngine(Engine):
    """Any device and any group that torch.distributed can send messages over."""

    name = "reference"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.mailbox = Mailbox(world.group, world.timeout_s, self.meter.wait_s, world.channel)
        self._epoch = 0
        self._is_closed = False

    @property
    def device_types(self) -> tuple[str, ...]:
        return group_device_types(self.world.group)

    @property
    def plans_two_levels(self) -> bool:
        return self.world.ablation.deduplicate and self.world.topology.num_nodes > 1

    def agree_on_error(self, call: Call) -> None:
        self._agree(call, None)

    def dispatch(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        weights: Tensor | None,
        routing: Tensor | Plan,
    ) -> Delivery:
        operation = call.operation.text
        if isinstance(routing, SegmentPlan):
            self._agree(call, None)
            plan = routing
        else:
            assert isinstance(routing, Tensor), "plans come from this engine"
            plan = self._make_plan(call, routing)
        hops = self._hops(plan, operation)
        row_bytes = sum(bytes_per_row(each) for each in rows)
        for hop in hops:
            self.meter.moved((hop.leg.peer_ptr.diff() * row_bytes).tolist())
        self.meter.dispatched(plan.num_arrivals)
        with stage("move"):
            return Delivery(
                rows=tuple(self._deliver(each, plan, hops) for each in rows),
                row_weights=self._deliver_weights(weights, plan, hops),
                plan=plan,
            )

    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
        row_values: Tensor | None = None,
    ) -> Returned:
        assert isinstance(plan, SegmentPlan), "plans come from this engine"
        self._agree(call, None)
        hops = self._hops(plan, call.operation.text)
        with stage("sum"):
            sums = tuple(self._sum(each, row_weights, plan, hops) for each in rows)
        row_bytes = sum(bytes_per_row(each) for each in rows)
        for hop in hops:
            self.meter.moved((hop.arrival.peer_ptr.diff() * row_bytes).tolist())
        self.meter.combined()
        if row_values is None:
            return Returned(sums=sums, pair_values=None)
        return Returned(sums=sums, pair_values=self._return_values(row_values, plan, hops))

    def exchange(
        self,
        call: Call,
        source: Tensor,
        send: Sequence[Segments],
        out: Tensor,
        receive: Sequence[Segments],
    ) -> None:
        records = self._agree(call, exchange_payload(send, receive))
        check_exchange(records[:, HEADER:], self.world.topology.rank)
        swap_segments(self.mailbox, source, send, out, receive, operation=call.operation.text)

    def synchronize(self) -> None:
        pass

    def stats(self) -> Stats:
        return self.meter.stats(window_bytes=0)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self, lost: int | None = None) -> None:
        self._is_closed = True
        if lost is not None:
            # Also who has missed another: nobody else may wait for this rank.
            self.mailbox.notices.tell(lost)
            self.mailbox.notices.hang_up()

    def _agree(self, call: Call, payload: Tensor | None) -> Tensor:
        """Everybody's records, int64 `[P, HEADER + payload]` on the CPU."""
        with stage("agree"):
            return self._publish(call, payload)

    def _publish(self, call: Call, payload: Tensor | None) -> Tensor:
        self._epoch += 1
        record = torch.zeros(self.world.record_len, dtype=torch.int64, device="cpu")
        record[:HEADER] = torch.tensor(call.head(self._epoch), device="cpu")
        if payload is not None:
            record[HEADER : HEADER + payload.shape[0]] = payload
        return share_records(self.mailbox, call, record)

    def _make_plan(self, call: Call, topk_idx: Tensor) -> SegmentPlan:
        world, topology = self.world, self.world.topology
        operation = call.operation.text
        with stage("plan"):
            pairs = sort_pairs(topk_idx, topology)
            packed = count_pairs(pairs, topology)
        records = self._agree(call, packed.cpu())
        packed = records[:, HEADER:].to(topk_idx.device)
        counts = Counts.split(packed, topology.num_experts, topology.num_ranks, topology.num_nodes)
        sends = plan_sends(
            pairs,
            counts,
            topology,
            alignment=world.alignment,
            two_level=self.plans_two_levels,
            ablation=world.ablation,
        )
        traffic = sends.traffic
        arrival = ship_slots(self.mailbox, sends.direct, traffic.direct, operation=operation)
        forwarding = None
        if sends.forward is not None and traffic.forward is not None and traffic.relay is not None:
            received = ship_slots(self.mailbox, sends.forward, traffic.forward, operation=operation)
            relay = plan_relay(received, traffic.relay, topology, world.top_k)
            forwarding = Forwarding(
                send=sends.forward,
                arrival=received,
                relay=relay,
                relay_arrival=ship_slots(self.mailbox, relay, traffic.relay, operation=operation),
            )
        self.meter.planned(traffic.rows)
        return finish(self.new_identity(), sends, arrival, forwarding, topology.rank)

    def _hops(self, plan: SegmentPlan, operation: str) -> tuple[Hop, ...]:
        """The direct hop, and in a two-level plan those to and from forwarders."""
        direct = Hop(self.mailbox, plan.send, plan.arrival, operation)
        level = plan.forwarding
        if level is None:
            return (direct,)
        forward = Hop(self.mailbox, level.send, level.arrival, operation)
        relay = Hop(self.mailbox, level.relay, level.relay_arrival, operation)
        return direct, forward, relay

    def _deliver(self, rows: Tensor, plan: SegmentPlan, hops: tuple[Hop, ...]) -> Tensor:
        segments = as_segments(rows)
        arrived = [hops[0].send_segments(segments)]
        if len(hops) > 1:
            arrived.append(hops[2].send_segments(hops[1].send_segments(segments)))
        arrived.append(segments.new_zeros(1, segments.shape[1]))
        # Padding has segment -1, which is the row of zeros at the end.
        return from_segments(torch.cat(arrived)[plan.row_segment], rows)

    def _deliver_weights(
        self, weights: Tensor | None, plan: SegmentPlan, hops: tuple[Hop, ...]
    ) -> Tensor:
        if weights is None:
            return (plan.row_segment >= 0).to(torch.float32)
        row_weights = weights.new_zeros(plan.num_rows)
        flat = weights.flatten()
        row_weights[plan.arrival.slot] = hops[0].send_pairs(flat)
        if plan.forwarding is not None:
            relayed = hops[2].send_pairs(hops[1].send_pairs(flat))
            row_weights[plan.forwarding.relay_arrival.slot] = relayed
        return row_weights

    def _sum(
        self, rows: Tensor, row_weights: Tensor | None, plan: SegmentPlan, hops: tuple[Hop, ...]
    ) -> Tensor:
        flat = rows.reshape(rows.shape[0], rows.shape[1:].numel())
        arrival, send = plan.arrival, plan.send
        own = partial_sums(flat, row_weights, arrival.slot_ptr, arrival.slot)
        partials = [hops[0].return_segments(own)]
        if plan.forwarding is not None:
            last, relay = plan.forwarding.relay_arrival, plan.forwarding.relay
            relayed = partial_sums(flat, row_weights, last.slot_ptr, last.slot)
            node = node_sums(hops[2].return_segments(relayed), relay.sum_segment, relay.sum_node)
            partials.append(hops[1].return_segments(node))
        sums = node_sums(torch.cat(partials), send.sum_segment, send.sum_node)
        return sums.view(plan.num_tokens, *rows.shape[1:])

    def _return_values(self, values: Tensor, plan: SegmentPlan, hops: tuple[Hop, ...]) -> Tensor:
        returned = values.new_zeros(plan.num_tokens * plan.top_k)
        returned[plan.send.pair] = hops[0].return_pairs(values[plan.arrival.slot])
        if plan.forwarding is not None:
            level = plan.forwarding
            held = values.new_empty(level.arrival.slot.shape[0])
            held[level.relay.pair] = hops[2].return_pairs(values[level.relay_arrival.slot])
            returned[level.send.pair] = hops[1].return_pairs(held)
        return returned.view(plan.num_tokens, plan.top_k)
