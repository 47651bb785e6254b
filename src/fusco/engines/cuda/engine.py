"""The CUDA engine: rows land in their final slots in one kernel, over NVLink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery, Engine, Returned, World
from fusco.engines.cuda.combine import Combiner
from fusco.engines.cuda.dispatch import Dispatcher
from fusco.engines.cuda.kernels.structs import MAX_PARTS
from fusco.engines.cuda.session import Session
from fusco.types import CompactPlan, Plan, Segments, Stats

Result = TypeVar("Result")


class CudaEngine(Engine):
    """Ranks whose GPUs reach each other's memory. Plans have one level."""

    name = "cuda"
    finds_bad_ids = True
    row_unit_bytes = 16
    max_parts = MAX_PARTS

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._session: Session | None = Session(world)
        self._dispatcher = Dispatcher(self._session)
        self._combiner = Combiner(self._session)

    @property
    def device_types(self) -> tuple[str, ...]:
        return ("cuda",)

    @property
    def plans_two_levels(self) -> bool:
        return False

    @property
    def is_closed(self) -> bool:
        return self._session is None

    def agree_on_error(self, call: Call) -> NoReturn:
        self._open().raise_everywhere(call)

    def dispatch(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        weights: Tensor | None,
        routing: Tensor | Plan,
    ) -> Delivery:
        self._open()
        dense = tuple(each.contiguous() for each in rows)
        weights = None if weights is None else weights.contiguous()
        if isinstance(routing, CompactPlan):
            return self._dispatcher.dispatch_planned(call, dense, weights, routing)
        assert isinstance(routing, Tensor), "plans come from this engine"
        return self._dispatcher.dispatch_new(
            call, dense, weights, routing.contiguous(), self.new_identity
        )

    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
        row_values: Tensor | None = None,
    ) -> Returned:
        assert isinstance(plan, CompactPlan), "plans come from this engine"
        self._open()
        dense = tuple(each.contiguous() for each in rows)
        row_weights = None if row_weights is None else row_weights.contiguous()
        row_values = None if row_values is None else row_values.contiguous()
        return self._combiner.combine(call, dense, row_weights, plan, row_values)

    def run_beside(
        self, operation: Callable[[], Result], inputs: Sequence[Tensor]
    ) -> tuple[Result, torch.cuda.Event]:
        session = self._open()
        session.share_device()
        return session.order.run_beside(operation, inputs)

    def synchronize(self) -> None:
        self._open().synchronize()

    def combine_backward(
        self,
        call: Call,
        grads: tuple[Tensor, ...],
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        if row_weights is None or len(grads) > 1:
            return super().combine_backward(call, grads, rows, row_weights, plan)
        self._open()
        assert isinstance(plan, CompactPlan), "plans come from this engine"
        got = self._dispatcher.dispatch_planned(
            call,
            (grads[0].contiguous(),),
            row_weights.contiguous(),
            plan,
            combined=rows[0].contiguous(),
        )
        return got.rows, got.row_weights

    def exchange(
        self,
        call: Call,
        source: Tensor,
        send: Sequence[Segments],
        out: Tensor,
        receive: Sequence[Segments],
    ) -> None:
        raise NotImplementedError

    def stats(self) -> Stats:
        return self.meter.stats(window_bytes=self._open().num_bytes)

    def close(self, lost: int | None = None) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None

    def _open(self) -> Session:
        assert self._session is not None, "operators look up open engines only"
        return self._session
