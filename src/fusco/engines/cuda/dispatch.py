"""Dispatch on GPUs: reserve a block, plan and move in two kernels, learn how many rows came."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Delivery
from fusco.engines.cuda.jit import Variant
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.kernels.structs import MAX_PARTS, Verdict
from fusco.engines.cuda.launch import Launch
from fusco.engines.cuda.plans import Addresses, BlockPlan
from fusco.engines.cuda.session import MAX_PLAN_BLOCKS, Report, Session
from fusco.errors import EngineUnavailableError, WindowMemoryError, input_error
from fusco.layout.compact import PlanLayout, part_starts
from fusco.layout.heap import Block, Heap
from fusco.layout.segments import bytes_per_row
from fusco.plans import Plan

_GO = int(Verdict.GO)  # members of enumerations are slow to look up
_PLAN_THREADS = 512
_TOKENS_PER_PLAN_BLOCK = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """How a block of the dispatch kernel is divided, at the most."""

    max_warps: int
    max_slot_bytes: int


# Tuned on H100 at hidden 7168 in bfloat16, 8192 tokens: whole rows, as many as fit together;
# and where warps weigh what they move, more of them.
_MOVING = _Work(max_warps=14, max_slot_bytes=16384)
_WEIGHING = _Work(max_warps=16, max_slot_bytes=7168)
_BYTES_IN_FLIGHT = 19 << 20
"""As many as memory and links need; of more, those on their way at the end keep others waiting."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    """What follows from the formats of the rows, and so need not be worked out at every call.

    Attributes:
        row_bytes: of each tensor.
        slot_bytes: of a row, the part that a warp moves at once.
        threads, shared_bytes: of a block of the dispatch kernel.
        parts: dtypes and shapes of the rows and the row weights.
    """

    row_bytes: tuple[int, ...]
    slot_bytes: int
    threads: int
    shared_bytes: int
    parts: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, rows: tuple[Tensor, ...], session: Session, work: _Work) -> _Format:
        row_bytes = tuple(bytes_per_row(each) for each in rows)
        slot_bytes = min(work.max_slot_bytes, max(row_bytes))
        # Beside a warp's slot lie its barrier and, once a block, the places of all ranks.
        places = session.num_ranks * (MAX_PARTS + 2) * 8
        room = session.max_shared_bytes - places
        in_flight = _BYTES_IN_FLIGHT // (session.num_sms * slot_bytes)
        num_warps = max(2, min(work.max_warps, room // (slot_bytes + 8), in_flight) // 2 * 2)
        return cls(
            row_bytes=row_bytes,
            slot_bytes=slot_bytes,
            threads=num_warps * 32,
            shared_bytes=num_warps * (slot_bytes + 8) + places,
            parts=(*((each.dtype, tuple(each.shape[1:])) for each in rows), (torch.float32, ())),
        )


class _Planning(NamedTuple):
    """What follows from the number of tokens.

    Attributes:
        layout: of the plan.
        num_blocks, shared_bytes, chunk_tokens: of the plan kernel, and tokens of each block.
    """

    layout: PlanLayout
    num_blocks: int
    shared_bytes: int
    chunk_tokens: int


class Prepared(NamedTuple):
    """What a dispatch of plain tensors takes, for the fast path.

    Attributes:
        form: of its rows.
        layout: of its plan.
        chunk_tokens: of a block of the plan kernel.
        plan, dispatch: the two launches.
    """

    form: _Format
    layout: PlanLayout
    chunk_tokens: int
    plan: Launch
    dispatch: Launch


class Room(NamedTuple):
    """A block, and the heap that it returns to."""

    block: Block
    home: Heap


class Dispatcher:
    """Launches the two kernels of a dispatch, and wraps what they bring."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._static_rows = static_rows = session.world.max_recv_tokens
        self.static_bytes = (
            part_starts([session.world.row_bytes], static_rows or 0)[-1] + MAX_PARTS * 128
        )
        self.plan_args = structs.PlanArgs()
        self.args = structs.DispatchArgs()
        self._plan = session.launcher(Variant(name="plan"), self.plan_args)
        self._dispatch = session.launcher(Variant(name="dispatch"), self.args)
        self._weighing = session.launchers("dispatch", self.args)
        self._row_addresses = self.args.rows  # the same memory; looking it up takes longer
        self._formats: dict[tuple[str, _Work], _Format] = {}
        self._plannings: dict[int, _Planning] = {}
        self._spare: dict[tuple[int, int, bool], tuple[Tensor, Addresses]] = {}

    def dispatch_new(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        weights: Tensor | None,
        topk_idx: Tensor,
        new_number: Callable[[], int],
    ) -> Delivery:
        """Plan and dispatch. Only when all ranks have counted is it known who needs how much room;
        where it is not there, all ranks add some and begin again."""
        session = self._session
        stream = session.order.begin()
        form = self._format_of(call, rows, _MOVING)
        num_tokens = topk_idx.shape[0]
        planning = self._plannings.get(num_tokens) or self._planning(num_tokens)
        # Memory belongs to the stream that it was allocated on, and tensors of the inference mode
        # are no others.
        spare = stream, num_tokens, torch.is_inference_mode_enabled()
        found = self._spare.pop(spare, None)
        if found is None:
            try:
                found = self._allocate(planning.layout)
            except torch.OutOfMemoryError as error:
                session.raise_out_of_memory(call, error)
        block, addresses = found
        self._set_planning(topk_idx, form, planning, addresses)
        num_rows = self._static_rows
        self._check_capture(call)
        while True:
            room = self._reserve(call, form, stream, None)
            ticket = session.describe(call, room.block)
            self._plan(stream, planning.num_blocks, _PLAN_THREADS, planning.shared_bytes)
            # While the GPU plans.
            self._set_rows(rows, weights, form)
            self._set_plan(addresses, is_planned=False)
            self._dispatch(stream, session.num_sms, form.threads, form.shared_bytes)
            if num_rows is not None:
                session.failures.raise_lost()
                session.failures.warn()
                break
            # There is time until the report comes.
            with suppress(torch.OutOfMemoryError):
                self._spare = {spare: self._allocate(planning.layout)}
            report = self._await_report(ticket, form)
            if report.verdict == _GO:
                num_rows = report.num_rows
                break
            self.make_room(call, room, report)
        plan = BlockPlan(
            number=new_number(),
            key=session.world.key,
            num_rows=num_rows,
            layout=planning.layout,
            block=block,
            addresses=addresses,
            stream=stream,
            one=session.one,
        )
        return self.wrap(room, form, num_rows, plan)

    def dispatch_planned(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        weights: Tensor | None,
        plan: Plan,
        combined: Tensor | None = None,
    ) -> Delivery:
        """Dispatch by an existing plan.

        With `combined`, `[R, ...]`, this is the backward of its combine: `rows` are the gradients
        of the sums and `weights` those of the rows, `[R]`; what comes is weighed, and with it come
        the gradients of the weights.
        """
        session, args = self._session, self.args
        kernel = self._dispatch if combined is None else self._weighing(combined.dtype)
        args.combined = 0 if combined is None else combined.data_ptr()
        stream = session.order.begin()
        form = self._format_of(call, rows, _MOVING if combined is None else _WEIGHING)
        self._set_rows(rows, weights, form)
        num_rows = plan.num_rows
        self._set_plan(Addresses.of(plan, stream), is_planned=True)
        self._check_capture(call)
        while True:
            room = self._reserve(call, form, stream, num_rows)
            ticket = session.describe(call, room.block)
            kernel(stream, session.num_sms, form.threads, form.shared_bytes)
            if self._static_rows is not None:
                session.failures.raise_lost()
                session.failures.warn()
                break
            report = self._await_report(ticket, form)
            if report.verdict == _GO:
                break
            self.make_room(call, room, report)
        return self.wrap(room, form, num_rows, plan)

    def prepare(self, call: Call, rows: Tensor, num_tokens: int) -> Prepared:
        """See `Prepared`."""
        form, planning = self._format_of(call, (rows,), _MOVING), self._planning(num_tokens)
        return Prepared(
            form=form,
            layout=planning.layout,
            chunk_tokens=planning.chunk_tokens,
            plan=self._plan.prepare(planning.num_blocks, _PLAN_THREADS, planning.shared_bytes),
            dispatch=self._dispatch.prepare(self._session.num_sms, form.threads, form.shared_bytes),
        )

    def _check_capture(self, call: Call) -> None:
        if self._static_rows is None and self._session.order.is_capturing:
            raise input_error(
                call.operation.text,
                "max_recv_tokens",
                got="None while a CUDA graph is captured",
                expected="a number of rows",
                remedy="make the Shuffle with max_recv_tokens=; the host cannot wait in a graph",
            )

    def _planning(self, num_tokens: int) -> _Planning:
        session = self._session
        layout = PlanLayout.of(
            num_tokens=num_tokens,
            top_k=session.world.top_k,
            num_local=session.constants.num_local,
            num_ranks=session.num_ranks,
            max_tokens=session.max_tokens,
        )
        chunk, shared_bytes = self._divide_plan(num_tokens)
        num_blocks = max(1, -(-num_tokens // chunk))
        planning = self._plannings[num_tokens] = _Planning(layout, num_blocks, shared_bytes, chunk)
        return planning

    def _allocate(self, layout: PlanLayout) -> tuple[Tensor, Addresses]:
        block = torch.empty(layout.end // 4, dtype=torch.int32, device=self._session.device)
        return block, Addresses.within(block, layout)

    def _set_plan(self, plan: Addresses, *, is_planned: bool) -> None:
        args = self.args
        args.is_planned = is_planned
        args.tokens_per_expert, args.expert_offsets, args.pairs, args.links = plan

    def _reserve(self, call: Call, form: _Format, stream: int, num_rows: int | None) -> Room:
        """For what this rank will receive: of the size that is known, else the largest."""
        session = self._session
        heap = session.heap
        if self._static_rows is None:
            if num_rows is None:
                return Room(heap.free.reserve_largest(), heap.free)
            need = part_starts(form.row_bytes, num_rows)[-1]
            return Room(heap.free.reserve(need), heap.free)
        need = self.static_bytes
        is_capturing = session.order.is_capturing
        home = heap.captured.of(stream) if is_capturing else heap.free
        block = heap.reserve(need, home)
        if block.size >= need:
            return Room(block, home)
        heap.free.release(block)
        if is_capturing:
            raise WindowMemoryError(
                f"{call.operation.text}: no block of {need} bytes is free, and windows cannot grow "
                "while a CUDA graph is captured; run the same calls once before each capture, "
                "keeping alive what the graph keeps alive, or capture into the memory pool of a "
                "graph captured before"
            )
        session.grow(call.operation.text, need)
        return Room(heap.free.reserve(need), heap.free)

    def _await_report(self, ticket: int, form: _Format) -> Report:
        session = self._session
        if not session.has_reported(ticket):
            dtype, shape = form.parts[0]
            session.heap.rehearse((1, *shape), dtype)
        return session.await_report(ticket)

    def make_room(self, call: Call, room: Room, report: Report) -> None:
        """Grow, after a report that there was no room; raise what else it reports."""
        room.home.release(room.block)
        if report.verdict != Verdict.SHORT:
            self._session.failures.raise_reported(report.verdict)
        self._session.grow(call.operation.text, report.need)

    def _format_of(self, call: Call, rows: tuple[Tensor, ...], work: _Work) -> _Format:
        form = self._formats.get((call.form, work))
        if form is None:
            form = self._formats[call.form, work] = _Format.of(rows, self._session, work)
        return form

    def _set_planning(
        self, topk_idx: Tensor, form: _Format, planning: _Planning, plan: Addresses
    ) -> None:
        args = self.plan_args
        args.num_parts = len(form.row_bytes)
        args.row_bytes[: args.num_parts] = form.row_bytes
        args.topk_idx = topk_idx.data_ptr()
        args.num_tokens = planning.layout.num_tokens
        args.chunk_tokens = planning.chunk_tokens
        args.tokens_per_expert, args.expert_offsets, args.pairs, args.links = plan

    def _set_rows(self, rows: tuple[Tensor, ...], weights: Tensor | None, form: _Format) -> None:
        args = self.args
        args.num_parts = len(rows)
        args.row_bytes[: len(rows)] = form.row_bytes
        args.slot_bytes = form.slot_bytes
        for part, each in enumerate(rows):
            self._row_addresses[part] = each.data_ptr()
        args.num_tokens = rows[0].shape[0]
        args.weights = 0 if weights is None else weights.data_ptr()

    def _divide_plan(self, num_tokens: int) -> tuple[int, int]:
        """Tokens and bytes of shared memory of a block of the plan kernel."""
        session = self._session
        # Its blocks wait for each other, so all of them must run at once.
        num_blocks = min(MAX_PLAN_BLOCKS, session.num_sms)
        chunk = max(_TOKENS_PER_PLAN_BLOCK, -(-num_tokens // num_blocks))
        num_counts = session.constants.num_experts + session.num_ranks
        return chunk, 4 * (3 * num_counts + 1 + chunk * session.world.top_k)

    def check_plan(self) -> None:
        """Raise, as on all ranks, where a block of the plan kernel has no room for its tokens."""
        session = self._session
        _, need = self._divide_plan(session.max_tokens)
        if need > session.max_shared_bytes:
            raise EngineUnavailableError(
                f"Shuffle: engine 'cuda' plans {session.max_tokens} tokens for "
                f"{session.constants.num_experts} experts in {need} bytes of a multiprocessor's "
                f"memory, more than its {session.max_shared_bytes}; use a smaller max_tokens, a "
                "larger num_sms, or another engine"
            )

    def wrap(self, room: Room, form: _Format, num_rows: int, plan: Plan) -> Delivery:
        """The rows and their weights where they lie; the rest of the block is free again."""
        heap = self._session.heap
        block, home = room
        starts = part_starts(form.row_bytes, num_rows)
        if self._static_rows is None:
            home.shrink(block, starts[-1])
        else:
            starts[-1] = block.size
        *got, row_weights = [
            heap.as_tensor(Block(block.base + start, end - start), (num_rows, *shape), dtype, home)
            for (dtype, shape), (start, end) in zip(form.parts, pairwise(starts), strict=True)
        ]
        return Delivery(tuple(got), row_weights, plan)
