"""Combine between nodes: partial sums within nodes, one sum a node over the network."""

from __future__ import annotations

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Returned
from fusco.engines.node import NodeBlocks
from fusco.engines.two_level.combine_cargo import CombineCargo
from fusco.engines.two_level.session import Session
from fusco.engines.two_level.unfused import combine_whole
from fusco.layout.blocks import Sections
from fusco.layout.records import HEADER
from fusco.layout.segments import bytes_per_row, without_gaps
from fusco.plans import SlicedPlan
from fusco.profiling import stage


def combine(
    session: Session,
    call: Call,
    rows: tuple[Tensor, ...],
    row_weights: Tensor | None,
    plan: SlicedPlan,
    row_values: Tensor | None,
) -> Returned:
    """See `Engine.combine`. Section i holds the partials of tensor i; behind them come the values
    that return to their pairs."""
    widths = [bytes_per_row(each) for each in rows]
    num_pairs = plan.near.slot.shape[0] + plan.relay_pair.shape[0]
    num_values = 0 if row_values is None else num_pairs
    held = torch.tensor([plan.held.shape[0], num_values], device="cpu")
    own = _sections(held[None], widths)
    with stage("agree"):
        call, dense = session.prepare(call, lambda: _dense(rows, row_weights))
        call, block = session.reserve(call, int(own.total[0]))
        records = session.agree(call, block, held)
    assert dense is not None, "else all have raised"
    rows, row_weights = dense
    sections = _sections(records[:, HEADER : HEADER + 2], widths)
    agreement = session.fit(call, block, records, sections.total)
    blocks = session.open(agreement, sections.of(session.node.ranks))
    values = None
    if row_values is not None:
        values = _Values(session, plan, blocks, len(rows), call.operation.text)
        values.push(row_values)
    if session.world.ablation.fusion:
        cargo = CombineCargo(
            rows,
            row_weights,
            plan,
            session.world.topology,
            session.size,
            session.node,
            blocks,
            None if values is None else values.collect,
        )
        with stage("slices"):
            session.transport.run(cargo, call.operation.text)
        sums = cargo.sums
    else:
        sums = combine_whole(session, call.operation.text, blocks, rows, row_weights, plan)
        if values is not None:
            values.collect()
    with stage("wait"):
        blocks.finish()
        pair_values = None if values is None else values.finish()
    session.node.release(agreement.block)
    return Returned(sums=tuple(sums), pair_values=pair_values)


class _Values:
    """Values of rows that return to their pairs, unsummed, by way of the forwarders."""

    def __init__(
        self, session: Session, plan: SlicedPlan, blocks: NodeBlocks, section: int, operation: str
    ) -> None:
        self._session = session
        self._plan = plan
        self._blocks = blocks
        self._section = section
        self._operation = operation

    def push(self, row_values: Tensor) -> None:
        """Give the ranks of the node theirs."""
        partials = self._plan.partials
        target = torch.repeat_interleave(partials.target, partials.slot_ptr.diff())
        each = torch.arange(partials.slot.shape[0] + 1, device=row_values.device)
        self._blocks.scatter(
            self._section, row_values, partials.slot, each, partials.pair_place, target
        )

    def collect(self) -> None:
        """Send on those of other nodes' tokens."""
        plan = self._plan
        # All have pushed their values before they began with their first sums.
        self._blocks.wait(0)
        found = self._blocks.view(self._section, torch.empty(0, dtype=torch.float32, device="cpu"))
        num_near = plan.near.slot.shape[0]
        self._returned = found.new_zeros(plan.num_tokens * plan.top_k)
        self._returned[plan.near.pair] = found[:num_near]
        held = found.new_empty(plan.relay_pair.shape[0])
        held[plan.relay_pair] = found[num_near:]
        self._arriving = torch.empty(plan.far.pair.shape[0], dtype=torch.float32, device="cpu")
        received, far = plan.received, plan.far
        self._swap = self._session.mailbox.start(
            held.cpu().split(received.slot_ptr[received.peer_ptr].diff().tolist()),
            self._arriving.split(far.slot_ptr[far.peer_ptr].diff().tolist()),
            operation=self._operation,
        )

    def finish(self) -> Tensor:
        """float32 `[T, K]`, once all have arrived."""
        self._swap.wait()
        self._returned[self._plan.far.pair] = self._arriving.to(self._returned.device)
        return self._returned.view(self._plan.num_tokens, self._plan.top_k)


def _dense(
    rows: tuple[Tensor, ...], row_weights: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The same without gaps: now, since every slice would copy them whole."""
    return without_gaps(rows), None if row_weights is None else row_weights.contiguous()


def _sections(held: Tensor, widths: list[int]) -> Sections:
    """Of blocks with so many partials and values, int64 `[P, 2]`."""
    sizes = held.numpy()
    return Sections.stack([*(sizes[:, 0] * width for width in widths), sizes[:, 1] * 4])
