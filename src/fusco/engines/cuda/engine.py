"""The CUDA engine: rows land in their final slots in one kernel, over NVLink."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery, Engine, Returned, World
from fusco.engines.cuda.combine import combine
from fusco.engines.cuda.dispatch import dispatch_new, dispatch_planned
from fusco.engines.cuda.kernels.structs import MAX_PARTS
from fusco.engines.cuda.session import Session
from fusco.types import CompactPlan, Plan, Segments, Stats


class CudaEngine(Engine):
    """Ranks whose GPUs reach each other's memory. Plans have one level."""

    name = "cuda"
    finds_bad_ids = True
    row_unit_bytes = 16
    max_parts = MAX_PARTS

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._session: Session | None = Session(world)

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
        session = self._open()
        if isinstance(routing, CompactPlan):
            delivery = dispatch_planned(session, call, rows, weights, routing)
        else:
            assert isinstance(routing, Tensor), "plans come from this engine"
            delivery = dispatch_new(session, call, rows, weights, routing, self.new_identity)
        return delivery

    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
        row_values: Tensor | None = None,
    ) -> Returned:
        assert isinstance(plan, CompactPlan), "plans come from this engine"
        return combine(self._open(), call, rows, row_weights, plan, row_values)

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
        self._session = None

    def _open(self) -> Session:
        assert self._session is not None, "operators look up open engines only"
        return self._session
