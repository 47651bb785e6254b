"""What the kernels of the CUDA engine do, in plain torch on tensors of the CPU; see emulator.py.

What they tell other ranks through windows goes through files, and every rank writes its own rows.
"""

from __future__ import annotations

import ctypes
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.kernels.structs import Verdict
from fusco.engines.cuda.session import Session
from fusco.layout.compact import Links, links_len, part_starts
from fusco.layout.records import Field, Status
from fusco.planner import plan_compact
from fusco.testing import dense

_MOST_ID = 0x7FFFFFFF
_POLL_S = 5e-4


class _Lost(Exception):
    """A rank did not come."""


class Kernels:
    """The kernels of one rank, as methods; see kernels/*.cu."""

    def __init__(self, folder: Path, of: Session) -> None:
        name = f"{of.bulletin.group_name}-{of.bulletin.name}".replace("/", "-")
        self._folder = folder / name
        self._folder.mkdir(exist_ok=True)
        self._topology = of.world.topology
        self._rank, self._num_ranks = of.rank, of.num_ranks

    def agree(self, world: Any, call: Any) -> None:
        state = _state(world)
        epoch = state.epoch + 1
        verdict = self._agree(world, call, None)
        state.epoch = epoch - (verdict == Verdict.VOID)

    def plan(self, world: Any, call: Any, args: Any) -> None:
        state = _state(world)
        epoch = state.epoch + 1
        shape = (args.num_tokens, world.top_k)
        counts = _at(args.tokens_per_expert, (world.num_local,), torch.int64)
        offsets = _at(args.expert_offsets, (world.num_local + 1,), torch.int32)
        links = _flat_links(world, args)
        if _is_void(world, epoch):
            state.verdict = Verdict.VOID
            links[0] = 0
            counts.zero_(), offsets.zero_()
            return
        idx = _at(args.topk_idx, shape, torch.int64).clone()
        bad = idx[(idx < -1) | (idx >= world.num_experts)].clamp(-_MOST_ID, _MOST_ID).tolist()
        low, high = min([0, *bad]), max([0, *bad])
        idx[(idx < 0) | (idx >= world.num_experts)] = -1
        status = Status.BAD_INPUT if bad and call.status == Status.READY else call.status
        verdict, heads, routings = self._publish(world, call, status, call.plan, idx)
        num_rows, need = 0, 0
        if verdict == Verdict.GO:
            plans = plan_compact(
                routings, self._topology, max_tokens=world.max_tokens, alignment=world.alignment
            )
            mine, rows = plans[self._rank], [each.num_rows for each in plans]
            counts.copy_(mine.tokens_per_expert)
            offsets.copy_(mine.expert_offsets)
            _at(args.pairs, (2, *shape), torch.int32).copy_(mine.pairs)
            links.copy_(mine.links)
            need, has_room = _needs(world, args, rows, heads)
            num_rows = rows[self._rank]
            if not has_room:
                verdict = Verdict.SHORT
        if bad and verdict == Verdict.UNLIKE:
            _report_failure(world, call, verdict, self._rank, low, high)
        elif verdict in (Verdict.UNLIKE, Verdict.STALE) or (
            verdict == Verdict.SHORT and world.static_rows
        ):
            _report_failure(world, call, verdict, -1, -1, need)
        if verdict != Verdict.GO:
            counts.zero_(), offsets.zero_()
        links[0] = epoch if verdict == Verdict.GO else 0
        state.verdict, state.epoch = verdict, epoch
        _report(world, call, verdict, num_rows, need)

    def dispatch(
        self, world: Any, call: Any, args: Any, element: torch.dtype | None = None
    ) -> None:
        state = _state(world)
        epoch = state.epoch
        links = _links(world, args)
        if args.is_planned:
            epoch += 1
            verdict = self._agree(world, call, links)
            need = 0
            if verdict == Verdict.GO:
                rows = [world.static_rows or each for each in links.rows.tolist()]
                need, has_room = _needs(world, args, rows, self._heads)
                verdict = verdict if has_room else Verdict.SHORT
            _report(world, call, verdict, int(links.rows[self._rank]), need)
        else:
            verdict = Verdict.LOST if state.lost else Verdict(state.verdict)
        if verdict == Verdict.GO:
            self._move(world, call, args, epoch, links, element)
        state.epoch = epoch - (args.is_planned and verdict == Verdict.VOID)

    def combine(self, world: Any, call: Any, args: Any, element: torch.dtype) -> None:
        state = _state(world)
        epoch = state.epoch + 1
        links = _links(world, args)
        verdict = self._agree(world, call, links) if args.part == 0 else Verdict(state.verdict)
        width = args.row_bytes // element.itemsize
        out = _at(args.out, (args.num_tokens, width), element)
        shape = (args.num_tokens, world.top_k)
        values = _at(args.pair_values, shape, torch.float32)
        out.zero_()
        if args.pair_values:
            values.zero_()
        if verdict == Verdict.GO:
            num_rows = int(links.rows[self._rank])
            outputs, weights, row_values = zip(
                *self._swap(
                    world,
                    call,
                    f"{epoch}-sums-{args.part}",
                    (
                        _at(args.rows, (num_rows, width), element).clone(),
                        _at(args.row_weights, (num_rows,), torch.float32).clone(),
                        _at(args.row_values, (num_rows,), torch.float32).clone(),
                    ),
                ),
                strict=True,
            )
            rank_TK, slot_TK = _at(args.pairs, (2, *shape), torch.int32).to(torch.int64)
            layout: Any = SimpleNamespace(
                rank_TK={self._rank: rank_TK}, slot_TK={self._rank: slot_TK}
            )
            sums = dense.combine(
                layout,
                outputs,
                self._rank,
                # A rank without rows has no weights either.
                _gather(weights, rank_TK, slot_TK) if any(map(len, weights)) else None,
                node_of_rank=self._topology.node_of_rank,
            )
            out.copy_(sums)
            if args.pair_values:
                values.copy_(_gather(row_values, rank_TK, slot_TK))
        is_over = args.is_last and verdict != Verdict.VOID
        state.epoch = epoch if is_over else epoch - 1
        state.verdict = verdict

    def _move(
        self, world: Any, call: Any, args: Any, epoch: int, links: Links, element: Any
    ) -> None:
        row_bytes = args.row_bytes[: args.num_parts]
        shape = (args.num_tokens, world.top_k)
        sent = (
            [
                _at(address, (args.num_tokens, size), torch.uint8).clone()
                for address, size in zip(args.rows, row_bytes, strict=False)
            ],
            None if element or not args.weights else _at(args.weights, shape, torch.float32),
            _at(args.pairs, (2, *shape), torch.int32).to(torch.int64),
        )
        num_rows = int(links.rows[self._rank])
        chunks = _at(world.heaps, (call.chunk + 1, self._num_ranks), torch.int64)
        base = int(chunks[call.chunk, self._rank]) + call.base
        starts = part_starts(row_bytes, world.static_rows or num_rows)
        parts = [
            _at(base + start, (num_rows, size), torch.uint8)
            for start, size in zip(starts, row_bytes, strict=False)
        ]
        row_weights = _at(base + starts[-2], (num_rows,), torch.float32)
        is_padding = torch.ones(num_rows, dtype=torch.bool)
        got = self._swap(world, call, f"{epoch}-rows", sent)
        for rows, weights, (rank_TK, slot_TK) in got:
            token, k = (rank_TK == self._rank).nonzero(as_tuple=True)
            slot = slot_TK[token, k]
            is_padding[slot] = False
            for part, each in zip(parts, rows, strict=True):
                part[slot] = each[token]
            row_weights[slot] = 1.0 if weights is None else weights[token, k]
        for part in parts:
            part[is_padding] = 0
        row_weights[is_padding] = 0
        if element:
            wide = torch.float64 if element == torch.float64 else torch.float32
            combined = _at(args.combined, tuple(parts[0].shape), torch.uint8)
            grads = parts[0].view(element).to(wide)
            factors = _at(args.weights, (num_rows,), torch.float32).to(wide)
            row_weights.copy_((grads * combined.view(element).to(wide)).sum(dim=1))
            row_weights[is_padding] = 0
            weighed = torch.where(is_padding[:, None], 0, grads * factors[:, None])
            parts[0].view(element).copy_(weighed)

    def _agree(self, world: Any, call: Any, links: Links | None) -> Verdict:
        if _is_void(world, _state(world).epoch + 1):
            return Verdict.VOID
        number = call.plan if links is None else int(links.number)
        verdict, *_ = self._publish(world, call, call.status, number, None)
        if verdict == Verdict.GO and links is not None and not number:
            verdict = Verdict.INVALID
        if verdict not in (Verdict.GO, Verdict.LOST):
            _report_failure(world, call, verdict, -1, -1, 0)
        return verdict

    def _publish(
        self, world: Any, call: Any, status: int, plan: int, payload: Any
    ) -> tuple[Verdict, list[Any], list[Any]]:
        """The verdict, and what all ranks have published."""
        state = _state(world)
        epoch = state.epoch + 1
        if state.pending:
            status = Status.PENDING
        head = (epoch, call.operation, int(status), plan, call.signature, call.base, call.capacity)
        try:
            heads, payloads = zip(
                *self._swap(world, call, f"{epoch}", (head, payload)), strict=True
            )
        except _Lost:
            return Verdict.LOST, [], []
        for rank, each in enumerate(heads):
            index = (epoch & 1) * self._num_ranks + rank
            at = world.records_at + index * world.record_bytes
            own = int(_at(world.windows, (self._num_ranks,), torch.int64)[self._rank])
            _at(own + at, (len(each),), torch.int64).copy_(torch.tensor(each))
        self._heads = list(heads)
        statuses = [each[Field.STATUS] for each in heads]
        if Status.PENDING in statuses:
            verdict = Verdict.STALE
        elif any(statuses) or len({each[Field.OPERATION : Field.BASE] for each in heads}) > 1:
            verdict = Verdict.UNLIKE
        else:
            verdict = Verdict.GO
        return verdict, list(heads), list(payloads)

    def _swap(self, world: Any, call: Any, topic: str, mine: Any) -> list[Any]:
        """What all ranks have to say."""
        path = self._folder / f"{topic}-{self._rank}"
        path.with_suffix(".new").write_bytes(pickle.dumps(mine))
        path.with_suffix(".new").rename(path)
        deadline = time.monotonic() + world.timeout_ns / 1e9
        texts: list[bytes] = []
        for rank in range(self._num_ranks):
            theirs = self._folder / f"{topic}-{rank}"
            while not theirs.exists():
                if _state(world).lost or time.monotonic() > deadline:
                    _report_failure(world, call, Verdict.LOST, rank, -1, 0)
                    raise _Lost
                time.sleep(_POLL_S)
            texts.append(theirs.read_bytes())
        return [pickle.loads(text) for text in texts]


def _at(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The memory at an address; empty where there is none."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if not num_bytes:
        return torch.empty(list(shape), dtype=dtype)
    if not address:
        return torch.empty([0, *shape[1:]], dtype=dtype)
    raw = (ctypes.c_char * num_bytes).from_address(address)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(*shape)


def _state(world: Any) -> Any:
    return structs.State.from_address(world.state)


def _flat_links(world: Any, args: Any) -> Tensor:
    size = links_len(args.num_tokens, world.num_ranks, world.max_tokens, world.top_k)
    return _at(args.links, (size,), torch.int32)


def _links(world: Any, args: Any) -> Links:
    flat = _flat_links(world, args)
    return Links.split(flat, args.num_tokens, world.num_ranks, world.top_k)


def _needs(
    world: Any, args: Any, rows: list[int], heads: list[tuple[int, ...]]
) -> tuple[int, bool]:
    """What the neediest rank needs, and whether every rank has room."""
    row_bytes = args.row_bytes[: args.num_parts]
    if world.static_rows:
        return max(rows), max(rows) <= world.static_rows
    sizes = [part_starts(row_bytes, each)[-1] for each in rows]
    room = [each[Field.CAPACITY] for each in heads]
    return max(sizes), all(need <= has for need, has in zip(sizes, room, strict=True))


def _gather(of_rows: Sequence[Tensor], rank_TK: Tensor, slot_TK: Tensor) -> Tensor:
    """By choice, from the rank and row that it went to; 0 where it went nowhere."""
    found = torch.zeros(rank_TK.shape)
    for rank, each in enumerate(of_rows):
        is_there = rank_TK == rank
        found[is_there] = each[slot_TK[is_there]]
    return found


def _is_void(world: Any, epoch: int) -> bool:
    failed = _state(world).pending
    return bool(world.static_rows and failed and failed != epoch)


def _report_failure(
    world: Any, call: Any, verdict: Verdict, awaited: int, item: int, need: int
) -> None:
    state = _state(world)
    if verdict == Verdict.LOST:
        if state.lost:
            return
        state.lost = 1
    elif state.pending:
        return
    state.pending = state.epoch + 1
    failure = structs.Failure.from_address(world.failure)
    failure.epoch, failure.operation, failure.ticket = state.epoch + 1, call.operation, call.ticket
    failure.awaited, failure.item, failure.need = awaited, item, need
    failure.verdict = verdict


def _report(world: Any, call: Any, verdict: Verdict, num_rows: int, need: int) -> None:
    at = call.ticket % structs.REPORTS * ctypes.sizeof(structs.Report)
    report = structs.Report.from_address(world.reports + at)
    report.verdict, report.num_rows, report.need = verdict, num_rows, need
    report.ticket = call.ticket
