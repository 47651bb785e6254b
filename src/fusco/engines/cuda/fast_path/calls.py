"""Tells `module.c` what it needs of an engine, and of calls that it may serve."""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Engine
from fusco.engines.cuda import launch
from fusco.engines.cuda.combine import Combiner
from fusco.engines.cuda.dispatch import Dispatcher, Room
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.plans import Addresses, BlockPlan
from fusco.engines.cuda.session import Session
from fusco.layout.heap import CHUNK_SPAN, Block
from fusco.layout.records import Operation
from fusco.plans import Plan
from fusco.types import Dispatched

_KINDS = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.uint8: (1, 8),
}
"""Type and bits of elements, as DLPack says them, of rows that are served."""
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}


class FastPath:
    """Serves calls of one Shuffle.

    Args:
        module: what `load` returns.
        engine: of the Shuffle.
        works: its session, dispatcher, combiner and last plan, under these names.

    Attributes:
        dispatch: takes `x`, `topk_idx` and `topk_weights`, and returns what `Shuffle.dispatch`
            does; None where it does not serve them.
        combine: takes rows and what was dispatched, and returns what `Shuffle.combine` does, or
            None.
        dispatch_in_graph, combine_in_graph: what operations that autograd knows do; see
            `engines.base.FastPath`.
    """

    def __init__(self, module: Any, engine: Engine, works: Any) -> None:
        session: Session = works.session
        dispatcher: Dispatcher = works.dispatcher
        combiner: Combiner = works.combiner
        self._engine, self._session = engine, session
        self._dispatcher, self._combiner = dispatcher, combiner
        self._max_dims: int = module.MAX_DIMS
        heap, order = session.heap, session.order
        self._served = module.FastPath(
            SimpleNamespace(
                tensor_type=Tensor,
                dispatched_type=Dispatched,
                plan_type=BlockPlan,
                addresses_type=Addresses,
                block_type=Block,
                call_type=Call,
                float32=torch.float32,
                strided=torch.strided,
                from_dlpack=torch._C._from_dlpack,
                current_device=torch._C._cuda_getDevice,
                current_raw_stream=torch._C._cuda_getCurrentRawStream,
                is_transformed=torch._C._are_functorch_transforms_active,
                is_profiled=torch._C._autograd._profiler_enabled,
                is_stream_capturing=torch.cuda.is_current_stream_capturing,
                is_inference=torch.is_inference_mode_enabled,
                order=order,
                traffic=order.traffic,
                heap=heap.free,
                chunks=heap.chunks,
                calls=session.failures.calls,
                new_number=engine.new_number,
                dispatched=engine.meter.dispatched,
                combined=engine.meter.combined,
                works=works,
                one=session.one,
                finish=self._finish,
                wrap=self._wrap_nothing,
                zero=0,
                key=engine.world.key,
                device_type=_DEVICE_TYPES[session.device.type],
                device_index=session.device_index,
                tensor_index=session.one.get_device(),
                launch=launch.launch_address(),
                failure=session.constants.failure,
                reports=session.constants.reports,
                chunk_span=CHUNK_SPAN,
                static_rows=engine.world.max_recv_tokens or 0,
                static_bytes=dispatcher.static_bytes,
                call=ctypes.addressof(session.call),
                plan_args=ctypes.addressof(dispatcher.plan_args),
                dispatch_args=ctypes.addressof(dispatcher.args),
                combine_args=ctypes.addressof(combiner.args),
            )
        )
        self.dispatch, self.combine = self._served.dispatch, self._served.combine
        self.dispatch_in_graph = self._served.dispatch_in_graph
        self.combine_in_graph = self._served.combine_in_graph

    def know_dispatch(
        self, form: str, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, in_graph: bool
    ) -> None:
        """Serve dispatches like this one, which has been served before, from now on."""
        if x.dtype not in _KINDS or topk_idx.dtype != torch.int64 or x.dim() > self._max_dims:
            return
        call = Call(Operation.DISPATCH, form=form)
        got = self._dispatcher.prepare(call, x, topk_idx.shape[0])
        layout, type_and_bits = got.layout, _KINDS[x.dtype]
        tensors = (x, topk_idx, topk_weights)
        self._served.know_dispatch(
            (
                form if in_graph else None,
                *[part for each in tensors for part in (each.shape, each.dtype)],
            ),
            SimpleNamespace(
                **_words(call),
                call=call,
                make_block=functools.partial(
                    torch.empty, layout.end // 4, dtype=torch.int32, device=self._session.device
                ),
                layout=layout,
                format=got.form,
                expert_offsets=layout.expert_offsets,
                pairs=layout.pairs,
                links=layout.links,
                row_bytes=got.form.row_bytes[0],
                slot_bytes=got.form.slot_bytes,
                num_tokens=layout.num_tokens,
                chunk_tokens=got.chunk_tokens,
                type=type_and_bits[0],
                bits=type_and_bits[1],
                row_shape=tuple(x.shape[1:]),
                plan=got.plan,
                dispatch=got.dispatch,
            ),
        )

    def know_combine(self, form: str, rows: Tensor, *, in_graph: bool) -> None:
        """Likewise for weighted combines."""
        part, kernel, returners = self._combiner.prepare(form, rows)
        self._served.know_combine(
            (form if in_graph else None, rows.shape[1:], rows.dtype),
            SimpleNamespace(
                **_words(Call(Operation.COMBINE, form=form)),
                kind=Operation.COMBINE,
                form=form,
                num_returners=returners,
                returns_at=part.returns_at,
                row_bytes=part.row_bytes,
                piece_bytes=part.pieces.piece_bytes,
                num_slots=part.pieces.num_slots,
                combine=kernel,
            ),
        )

    def close(self) -> None:
        """Serve nothing any more, and keep no memory."""
        self._served.close()
        # They hold methods of this object; whoever has it still goes the long way.
        del self._served
        self.dispatch = self.combine = _serve_nothing
        self.dispatch_in_graph = self.combine_in_graph = _serve_nothing

    def _finish(self, call: Call, ticket: int, block: Block) -> int | None:
        """Wait for a report that does not come at once, or is not good: how many rows come; None
        where there is room for them only now."""
        with self._engine:
            report = self._session.await_report(ticket)
            if report.verdict == structs.Verdict.GO:
                return report.num_rows
            room = Room(block, self._session.heap.free)
            self._dispatcher.make_room(call, room, report)
        return None

    def _wrap_nothing(self, block: Block, form: Any, plan: Plan) -> Dispatched[Tensor]:
        """What was dispatched where no row has come."""
        room = Room(block, self._session.heap.free)
        (rows,), weights, _ = self._dispatcher.wrap(room, form, 0, plan)
        return Dispatched(tokens=rows, row_weights=weights, plan=plan)


def _serve_nothing(*_: object) -> None:
    pass


def _words(call: Call) -> dict[str, int]:
    """What a call is in a record."""
    _, operation, status, number, signature, *_ = map(int, call.head(0))
    return {"operation": operation, "status": status, "number": number, "signature": signature}
