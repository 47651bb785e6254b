"""The CPU engine: peers write rows straight into their final slots in each other's windows."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery, Engine, Returned, World
from fusco.engines.cpu.combine import combine
from fusco.engines.cpu.dispatch import dispatch_new, dispatch_planned
from fusco.engines.cpu.exchange import exchange
from fusco.engines.cpu.plans import ArrayPlan
from fusco.engines.cpu.session import Session
from fusco.layout.blocks import Ints
from fusco.layout.heap import NOTHING
from fusco.layout.segments import bytes_per_row, from_segments
from fusco.plans import Plan
from fusco.types import Segments, Stats


class CpuEngine(Engine):
    """Ranks of one host. Plans have one level, since every rank reaches every window; sums are
    still taken node by node where nodes are emulated."""

    name = "cpu"
    finds_bad_ids = True

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._session: Session | None = Session(world, self.meter.wait_s)
        self._process = os.getpid()

    @property
    def device_types(self) -> tuple[str, ...]:
        return ("cpu",)

    @property
    def plans_two_levels(self) -> bool:
        return False

    @property
    def epoch(self) -> int:
        return self._open().control.epoch

    @property
    def is_closed(self) -> bool:
        return self._session is None

    def agree_on_error(self, call: Call) -> None:
        session = self._open()
        session.agree(call, NOTHING, np.empty(0, dtype=np.int64))

    def dispatch(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        weights: Tensor | None,
        routing: Tensor | Plan,
    ) -> Delivery:
        session = self._open()
        if isinstance(routing, Plan):
            plan = ArrayPlan.of(routing)
            delivery = dispatch_planned(session, call, rows, weights, plan)
        else:
            delivery, rows_per_rank = dispatch_new(
                session, call, rows, weights, routing, self.new_identity
            )
            self.meter.planned(torch.from_numpy(rows_per_rank))
        assert isinstance(delivery.plan, ArrayPlan)
        leg, incoming = delivery.plan.leg, delivery.plan.incoming
        row_bytes = sum(bytes_per_row(each) for each in rows)
        self._count_bytes(leg.slot_ptr[leg.peer_ptr], row_bytes)
        self.meter.dispatched(incoming.slot.size)
        return delivery

    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
        row_values: Tensor | None = None,
    ) -> Returned:
        arrays = ArrayPlan.of(plan)
        returned, moved = combine(self._open(), call, rows, row_weights, arrays, row_values)
        self._count_bytes(moved, sum(bytes_per_row(each) for each in rows))
        self.meter.combined()
        return returned

    def empty_like(self, rows: Tensor) -> Tensor:
        window = self._open().window
        shape = rows.shape[0], bytes_per_row(rows)
        try:
            block = window.reserve(shape[0] * shape[1])
        except MemoryError:
            return torch.empty_like(rows)
        return from_segments(window.as_tensor(block, shape[0] * shape[1]).view(shape), rows)

    def exchange(
        self,
        call: Call,
        source: Tensor,
        send: Sequence[Segments],
        out: Tensor,
        receive: Sequence[Segments],
    ) -> None:
        exchange(self._open(), call, source, send, out, receive)

    def synchronize(self) -> None:
        pass

    def stats(self) -> Stats:
        return self.meter.stats(window_bytes=self._open().window.mapping.size)

    def close(self, lost: int | None = None) -> None:
        # A forked child shares the memory, but must not speak for the rank.
        if self._session is not None and self._process == os.getpid():
            self._session.close(lost)
        self._session = None

    def _count_bytes(self, rows_ptr: Ints, row_bytes: int) -> None:
        self.meter.moved(((rows_ptr[1:] - rows_ptr[:-1]) * row_bytes).tolist())

    def _open(self) -> Session:
        assert self._session is not None, "engines are entered while they are open"
        return self._session
