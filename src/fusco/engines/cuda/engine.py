"""The CUDA engine: rows land in their final slots in one kernel, over NVLink."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Concatenate, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery, Engine, Returned, World
from fusco.engines.cuda import fast_path
from fusco.engines.cuda.combine import Combiner
from fusco.engines.cuda.dispatch import Dispatcher
from fusco.engines.cuda.kernels.structs import MAX_PARTS
from fusco.engines.cuda.session import Session
from fusco.errors import EngineUnavailableError
from fusco.layout.compact import Links
from fusco.plans import CompactPlan, Plan
from fusco.types import Segments, Stats

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def _on_own_device(
    method: Callable[Concatenate[CudaEngine, Arguments], Result],
) -> Callable[Concatenate[CudaEngine, Arguments], Result]:
    """Kernels are launched on the current device, which may be another by now."""

    @functools.wraps(method)
    def run(engine: CudaEngine, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        session = engine._open().session
        if torch.cuda.current_device() == session.device_index:
            return method(engine, *arguments, **named)
        with torch.cuda.device(session.device):
            return method(engine, *arguments, **named)

    return run


class CudaEngine(Engine):
    """Ranks whose GPUs reach each other's memory. Plans have one level."""

    name = "cuda"
    finds_bad_ids = True
    has_compact_plans = True
    row_unit_bytes = 16
    max_parts = MAX_PARTS
    # A warp looks at all ranks or all experts of a token at once, and an id has 16 bits.
    most: ClassVar[Mapping[str, int]] = {"num_ranks": 32, "top_k": 32, "num_experts": 65535}
    """By name of a number, the largest that its kernels serve."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._works: _Works | None = _Works(world)
        if self._works.fast_path is not None:
            self.fast_path = fast_path.FastPath(self._works.fast_path, self, self._works)

    @property
    def device_types(self) -> tuple[str, ...]:
        return ("cuda",)

    @property
    def plans_two_levels(self) -> bool:
        return False

    @property
    def is_closed(self) -> bool:
        return self._works is None

    @property
    def device(self) -> torch.device:
        return self._open().session.device

    @_on_own_device
    def agree_on_error(self, call: Call) -> NoReturn:
        self._open().session.raise_everywhere(call)

    @_on_own_device
    def dispatch(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        weights: Tensor | None,
        routing: Tensor | Plan,
    ) -> Delivery:
        works = self._open()
        if isinstance(routing, Plan):
            weights, *dense = works.dense(call, weights, *rows)
            got = works.dispatcher.dispatch_planned(call, tuple(dense), weights, routing)
        else:
            topk_idx, weights, *dense = works.dense(call, routing, weights, *rows)
            got = works.dispatcher.dispatch_new(
                call, tuple(dense), weights, topk_idx, self.new_number
            )
        works.last_plan = got.plan
        self.meter.dispatched(0)
        return got

    @_on_own_device
    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
        row_values: Tensor | None = None,
    ) -> Returned:
        works = self._open()
        self.meter.combined()
        row_weights, row_values, *dense = works.dense(call, row_weights, row_values, *rows)
        return works.combiner.combine(call, tuple(dense), row_weights, plan, row_values)

    @_on_own_device
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
        works = self._open()
        self.meter.dispatched(0)
        grad, weights, combined = works.dense(call, grads[0], row_weights, rows[0])
        got = works.dispatcher.dispatch_planned(call, (grad,), weights, plan, combined=combined)
        return got.rows, got.row_weights

    def exchange(
        self,
        call: Call,
        source: Tensor,
        send: Sequence[Segments],
        out: Tensor,
        receive: Sequence[Segments],
    ) -> None:
        raise EngineUnavailableError(
            "exchange: engine 'cuda' does not serve it; use engine='reference'"
        )

    def check_beside(self) -> None:
        self._open().session.share_device()

    @_on_own_device
    def run_beside(
        self, operation: Callable[[], Result], inputs: Sequence[Tensor]
    ) -> tuple[Result, torch.cuda.Event]:
        return self._open().session.order.run_beside(operation, inputs)

    @_on_own_device
    def synchronize(self) -> None:
        self._open().session.synchronize()

    @_on_own_device
    def stats(self) -> Stats:
        """Waits for what was asked for, since the kernels count themselves."""
        works = self._open()
        counted = works.session.counted()
        rows = None if works.last_plan is None else works.rows_per_rank(works.last_plan)
        if rows is not None:
            self.meter.planned(rows)
        return replace(
            self.meter.stats(window_bytes=works.session.num_bytes),
            num_rows=counted.num_rows,
            bytes_to_peer=counted.bytes_to_peer,
            wait_s=counted.wait_s,
        )

    def close(self, lost: int | None = None) -> None:
        works, self._works = self._works, None
        path, self.fast_path = self.fast_path, None
        if path is not None:
            path.close()
        if works is not None:
            works.session.close()

    def _open(self) -> _Works:
        assert self._works is not None, "engines are entered while they are open"
        return self._works


class _Works:
    """All that goes when the engine is closed."""

    def __init__(self, world: World) -> None:
        self.session = session = Session(world)
        self.dispatcher, self.combiner, self.fast_path = session.make_ready(
            "kernels", self._load_kernels, "see what `fusco doctor` and `fusco warmup` find"
        )
        self.dispatcher.check_plan()
        self.last_plan: Plan | None = None

    def _load_kernels(self) -> tuple[Dispatcher, Combiner, Any | None]:
        self.session.load_kernels()
        return Dispatcher(self.session), Combiner(self.session), fast_path.load()

    def dense(self, call: Call, *tensors: Tensor | None) -> tuple[Any, ...]:
        """The same tensors, each in one piece; without memory for that all ranks raise."""
        try:
            if all(map(_is_dense, tensors)):
                return tensors
            return tuple([_dense(each) for each in tensors])
        except torch.OutOfMemoryError as error:
            self.session.raise_out_of_memory(call, error)

    def rows_per_rank(self, plan: Plan) -> Tensor | None:
        """int64 `[P]` on the CPU; None where the ranks did not agree on the plan."""
        ranks, top_k = self.session.num_ranks, plan.top_k
        compact = Plan.from_tensors(plan.to_tensors())
        assert isinstance(compact, CompactPlan), "plans come from this engine"
        parts = Links.split(compact.links, plan.num_tokens, ranks, top_k)
        return parts.rows.cpu().to(torch.int64) if int(parts.number) else None


def _is_dense(tensor: Tensor | None) -> bool:
    """Whether its elements lie one behind the other, from an address that kernels can take on."""
    return tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0)


def _dense(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or _is_dense(tensor):
        return tensor
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()
