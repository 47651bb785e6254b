"""Dispatch between nodes: plan, send slices to forwarders, spread what arrives, wrap what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery
from fusco.engines.node import NodeBlocks
from fusco.engines.two_level.dispatch_cargo import DispatchCargo
from fusco.engines.two_level.lanes import lanes_of
from fusco.engines.two_level.letters import Letters
from fusco.engines.two_level.plans import (
    Hops,
    node_list_lens,
    node_lists,
    pack_lists,
    packed_len,
    unpack_lists,
    with_bounds_on_host,
)
from fusco.engines.two_level.session import Session
from fusco.engines.two_level.unfused import dispatch_whole, pairs_to_node
from fusco.layout.blocks import Ints, Sections
from fusco.layout.records import HEADER
from fusco.layout.segments import bytes_per_row, from_segments, without_gaps
from fusco.legs import Arrival, Counts, Leg
from fusco.planner import Sends, offsets
from fusco.plans import SlicedPlan
from fusco.profiling import stage


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """One dispatch: what is moved and where it lands. Section i holds the rows of tensor i, then
    come the row weights and the lists that ranks of a node tell each other."""

    session: Session
    operation: str
    blocks: NodeBlocks
    rows: tuple[Tensor, ...]
    weights: Tensor | None

    def move(
        self,
        near: Leg,
        far: Leg,
        segments: Tensor,
        pairs: Tensor,
        tell: Callable[[], None],
        learn: Callable[[], Arrival],
    ) -> None:
        """Bring all rows and weights to their slots.

        Args:
            near: of own tokens to the own node.
            far: of own tokens to forwarders.
            segments: int64 `[P]`, segments that arrive here from each rank.
            pairs: int64 `[P]`, likewise pairs.
            tell: begins to tell forwarders what they get.
            learn: tells what arrives here.
        """
        session = self.session
        letters, received_weights = self._expect_weights(pairs)

        def tell_all() -> None:
            tell()
            letters.send(self._weights_for(far))

        def meanwhile() -> Arrival:
            for part, each in enumerate(self.rows):
                self.blocks.scatter(part, each, near.row, near.slot_ptr, near.slot, near.target)
            if self.weights is not None:
                self._write_weights(self.weights.flatten()[near.pair], near.slot, near.target)
            received = learn()
            letters.wait()
            if self.weights is not None:
                arrived = received_weights.to(self.weights.device)
                self._write_weights(arrived, received.slot, received.target)
            return received

        cargo = DispatchCargo(
            self.rows,
            far,
            offsets(segments),
            session.world.topology,
            session.size.rows,
            self.blocks,
            tell_all,
            meanwhile,
        )
        with stage("slices"):
            session.transport.run(cargo, self.operation)
        with stage("wait"):
            self.blocks.finish()

    def move_whole(self, plan: SlicedPlan, handed: Tensor) -> list[Tensor]:
        """The same without fusion; see `dispatch_whole`."""
        received = plan.received
        bounds = received.slot_ptr[received.peer_ptr]
        letters, received_weights = self._expect_weights(bounds.diff())
        letters.send(self._weights_for(plan.far))
        letters.wait()
        if self.weights is not None:
            near = plan.near
            self._write_weights(self.weights.flatten()[near.pair], near.slot, near.target)
            arrived = received_weights.to(self.weights.device)
            self._write_weights(arrived, received.slot, received.target)
        return dispatch_whole(self.session, self.operation, self.blocks, self.rows, plan, handed)

    def deliver(self, plan: SlicedPlan, moved: list[Tensor] | None = None) -> Delivery:
        """Rows become tensors where they lie, unless `moved` has them, uint8 `[R, bytes]`."""
        padding = plan.row_is_padding
        row_weights = (~padding).to(torch.float32)
        if self.weights is not None:
            row_weights = self.blocks.view(len(self.rows), row_weights).masked_fill(padding, 0)
        if moved is not None:
            self.blocks.keep(0)
            made = [from_segments(*each) for each in zip(moved, self.rows, strict=True)]
            return Delivery(rows=tuple(made), row_weights=row_weights, plan=plan)
        got = []
        for like, kept in zip(self.rows, self.blocks.keep(len(self.rows)), strict=True):
            segments = kept.view(plan.num_rows, bytes_per_row(like))
            if self.session.world.alignment > 1:
                segments[padding] = 0
            got.append(from_segments(segments, like))
        return Delivery(rows=tuple(got), row_weights=row_weights, plan=plan)

    def _expect_weights(self, pairs: Tensor) -> tuple[Letters, Tensor]:
        """The letters with weights, and the weights themselves once they have come, on the CPU.

        Args:
            pairs: int64 `[P]`, how many come from each rank.
        """
        num_pairs = 0 if self.weights is None else int(pairs.sum())
        received = torch.empty(num_pairs, dtype=torch.float32, device="cpu")
        parts = received.split(pairs.tolist()) if self.weights is not None else ()
        return Letters(self.session.mailbox, parts, self.operation), received

    def _weights_for(self, far: Leg) -> tuple[Tensor, ...]:
        """By forwarder, the weights of what it gets, on the CPU."""
        if self.weights is None:
            return ()
        counts = far.slot_ptr[far.peer_ptr].diff().tolist()
        parts: tuple[Tensor, ...] = self.weights.flatten()[far.pair].cpu().split(counts)
        return parts

    def _write_weights(self, values: Tensor, slot: Tensor, target: Tensor) -> None:
        each = torch.arange(values.shape[0] + 1, device=values.device)
        self.blocks.scatter(len(self.rows), values, None, each, slot, target)


def dispatch_new(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    weights: Tensor | None,
    topk_idx: Tensor,
    new_identity: Callable[[], Tensor],
) -> tuple[Delivery, Tensor]:
    """Plan and dispatch; also the rows that each rank receives, int64 `[P]`."""
    world, topology, rank = session.world, session.world.topology, session.world.topology.rank
    with stage("plan"):
        call, dense = session.prepare(call, lambda: without_gaps(rows))
        call, counted = session.prepare(call, lambda: session.planner.count(topk_idx))
    with stage("agree"):
        block = session.node.reserve_largest()
        records = session.agree(call, block, None if counted is None else counted.packed)
    assert dense is not None, "else all have raised"
    assert counted is not None
    rows, identity = dense, new_identity()
    with stage("plan"):
        counts = Counts.split(
            records[:, HEADER:].to(topk_idx.device),
            topology.num_experts,
            topology.num_ranks,
            topology.num_nodes,
        )
        sends = session.planner.plan_sends(counted, counts)
        hops = Hops.of(sends.traffic)
        list_lens = node_list_lens(hops)
    assert sends.forward is not None
    sends = replace(
        sends,
        direct=with_bounds_on_host(sends.direct),
        forward=with_bounds_on_host(sends.forward),
    )
    assert sends.forward is not None
    num_rows = sends.traffic.rows.cpu()
    sections = _sections(rows, num_rows.numpy(), list_lens.sum(dim=0).numpy())
    agreement = session.fit(call, block, records, sections.total)
    blocks = session.open(agreement, sections.of(session.node.ranks))
    job = _Job(
        session=session, operation=call.operation.text, blocks=blocks, rows=rows, weights=weights
    )
    planning = _Planning(job, sends, hops, list_lens)
    segments, arriving = hops.far.segments[:, rank], hops.far.pairs[:, rank]
    moved = None
    if world.ablation.fusion:
        job.move(sends.direct, sends.forward, segments, arriving, planning.tell, planning.learn)
    else:
        planning.tell()
        planning.learn()
        blocks.reach(0)
        blocks.wait(0)
    with stage("plan"):
        plan = planning.finish(identity)
    if not world.ablation.fusion:
        moved = job.move_whole(plan, hops.near.pairs + hops.relay.pairs)
    return job.deliver(plan, moved), num_rows


def dispatch_planned(
    session: Session, call: Call, rows: tuple[Tensor, ...], weights: Tensor | None, plan: SlicedPlan
) -> Delivery:
    """Dispatch by an existing plan: every rank knows its need, and says how many rows it gets."""
    own = _sections(rows, np.array([plan.num_rows]), np.zeros(1, dtype=np.int64))
    payload = torch.tensor([plan.num_rows], device="cpu")
    if not session.world.ablation.fusion:
        payload = torch.cat((payload, pairs_to_node(plan, session.world.topology.num_ranks)))
    with stage("agree"):
        call, dense = session.prepare(call, lambda: without_gaps(rows))
        call, block = session.reserve(call, int(own.total[0]))
        records = session.agree(call, block, payload)
    assert dense is not None, "else all have raised"
    rows = dense
    num_rows = records[:, HEADER].numpy()
    sections = _sections(rows, num_rows, np.zeros_like(num_rows))
    agreement = session.fit(call, block, records, sections.total)
    blocks = session.open(agreement, sections.of(session.node.ranks))
    job = _Job(
        session=session, operation=call.operation.text, blocks=blocks, rows=rows, weights=weights
    )
    if not session.world.ablation.fusion:
        handed = records[:, HEADER + 1 : HEADER + payload.shape[0]]
        return job.deliver(plan, job.move_whole(plan, handed))
    received = plan.received
    pairs = received.slot_ptr[received.peer_ptr].diff()
    job.move(plan.near, plan.far, received.peer_ptr.diff(), pairs, lambda: None, lambda: received)
    return job.deliver(plan)


class _Planning:
    """A plan that becomes whole while rows are on their way."""

    def __init__(self, job: _Job, sends: Sends, hops: Hops, list_lens: Tensor) -> None:
        assert sends.forward is not None
        session, rank = job.session, job.session.world.topology.rank
        self._job = job
        self._sends = sends
        self._hops = hops
        self._list_lens = list_lens
        self._lists = [
            torch.empty(packed_len(hops.far, sender, rank), dtype=torch.int32, device="cpu")
            for sender in range(session.world.topology.num_ranks)
        ]
        self._letters = Letters(session.mailbox, self._lists, job.operation)

    def tell(self) -> None:
        """Begin to tell forwarders what they get."""
        session, far = self._job.session, self._sends.forward
        assert far is not None
        everybody = range(session.world.topology.num_ranks)
        self._letters.send([pack_lists(far, peer, session.size.tokens) for peer in everybody])

    def learn(self) -> Arrival:
        """What arrives here; the ranks of the node are told what they get."""
        session, blocks = self._job.session, self._job.blocks
        topology = session.world.topology
        near = self._sends.direct
        self._letters.wait()
        with stage("plan"):
            self._received, self._in_slice = unpack_lists(
                self._lists, self._hops.far, topology.rank, near.row.device
            )
            self._relay = session.planner.plan_relay(self._received, self._hops.relay)
        section = len(self._job.rows) + 1
        near_slice = near.row // session.size.tokens
        relay_slice = self._in_slice[self._relay.row]
        for mate in session.node.ranks:
            first = int(self._list_lens[: topology.rank, mate].sum())
            own = node_lists(near, near_slice, mate)
            blocks.put(section, mate, first, own)
            blocks.put(
                section, mate, first + own.shape[0], node_lists(self._relay, relay_slice, mate)
            )
        with stage("plan"):
            self._held = session.planner.held_lists(near, self._relay)
            far = self._sends.forward
            assert far is not None
            lanes = lanes_of(far.peer_ptr, topology, away=1)
            size = session.size
            self._final = session.planner.final_lists(near, far, lanes, size.tokens, size.rows)
        return self._received

    def finish(self, identity: Tensor) -> SlicedPlan:
        """The whole plan, once all ranks of the node have written."""
        session = self._job.session
        rank = session.world.topology.rank
        like = torch.empty(0, dtype=torch.int64, device="cpu")
        lists = self._job.blocks.view(len(self._job.rows) + 1, like)
        partials = session.planner.read_partials(
            lists, self._hops.near, self._hops.relay, session.node.ranks
        )
        sends = self._sends
        assert sends.forward is not None
        num_rows = int(sends.traffic.rows[rank])
        is_padding = torch.ones(num_rows, dtype=torch.bool, device=lists.device)
        is_padding[partials.slot] = False
        return SlicedPlan(
            identity=identity,
            tokens_per_expert=sends.tokens_per_expert,
            expert_offsets=sends.expert_offsets,
            row_is_padding=is_padding,
            near=sends.direct,
            far=sends.forward,
            received=self._received,
            received_slice=self._in_slice,
            relay_pair=self._relay.pair,
            partials=partials,
            held_ptr=self._held[0],
            held=self._held[1],
            final_ptr=self._final[0],
            final=self._final[1],
        )


def _sections(rows: Sequence[Tensor], num_rows: Ints, num_lists: Ints) -> Sections:
    return Sections.stack(
        [*(num_rows * bytes_per_row(each) for each in rows), num_rows * 4, num_lists * 8]
    )
