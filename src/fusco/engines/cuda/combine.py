"""Combine on GPUs: one kernel a tensor, of which the first agrees for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Returned
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.launch import Launch, Launcher
from fusco.engines.cuda.plans import Addresses
from fusco.engines.cuda.session import Session
from fusco.layout.compact import round_up
from fusco.layout.heap import NOTHING
from fusco.layout.segments import bytes_per_row
from fusco.plans import Plan

_RETURNERS = 100
"""Pipelines that keep a link busy with rows that they cut, on H200; more only keep sums waiting."""
_RETURNERS_PER_ROW = 20
"""As many for each row that a token has on this rank, where these are more: they take longer."""
_MAX_PIECE_BYTES = 2 * structs.SUMMERS * 32 * 16
"""What the summing warps of a pipeline sum in one step: two vectors a thread."""
_NUM_THREADS = structs.COMBINE_WARPS * 32


class Cut(NamedTuple):
    """Rows in pieces, and a block's shared memory in places for them."""

    piece_bytes: int
    num_slots: int
    shared_bytes: int


class _Part(NamedTuple):
    """What follows from the formats of the rows, for one tensor of them."""

    kernel: Launcher
    row_bytes: int
    returns_at: int
    pieces: Cut


class Combiner:
    """Launches the kernels of a combine, and returns before they have run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.args = structs.CombineArgs()
        self._kernels = session.launchers("combine", self.args)
        self._parts: dict[str, list[_Part]] = {}

    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
        row_values: Tensor | None,
    ) -> Returned:
        """See `Engine.combine`."""
        session, args = self._session, self.args
        stream = session.order.begin()
        # A kernel is loaded before anything is published, for that may fail.
        parts = self._parts.get(call.form) or self._parts_of(call.form, rows)
        num_tokens = plan.num_tokens
        pair_values = None
        try:
            sums = tuple([each.new_empty((num_tokens, *each.shape[1:])) for each in rows])
            if row_values is not None:
                pair_values = row_values.new_empty((num_tokens, plan.top_k))
        except torch.OutOfMemoryError as error:
            session.raise_out_of_memory(call, error)
        session.describe(call, NOTHING)
        args.row_values, args.pair_values = _address(row_values), _address(pair_values)
        args.row_weights = _address(row_weights)
        _, _, args.pairs, args.links = Addresses.of(plan, stream)
        args.num_tokens = num_tokens
        for number, (part, each, out) in enumerate(zip(parts, rows, sums, strict=True)):
            args.part, args.is_last = number, number == len(rows) - 1
            args.rows, args.out = each.data_ptr(), out.data_ptr()
            kernel, args.row_bytes, args.returns_at, pieces = part
            args.piece_bytes, args.num_slots, shared_bytes = pieces
            args.num_returners = self._num_returners(part, num_tokens, plan.num_rows)
            kernel(stream, session.num_sms, _NUM_THREADS, shared_bytes)
            args.row_values = args.pair_values = 0
        return Returned(sums=sums, pair_values=pair_values)

    def prepare(self, form: str, rows: Tensor) -> tuple[_Part, Launch, Callable[[int, int], int]]:
        """For the fast path: the part, launch, and `num_returners` by numbers of tokens and
        of rows."""
        (part,) = self._parts.get(form) or self._parts_of(form, (rows,))
        launch = part.kernel.prepare(self._session.num_sms, _NUM_THREADS, part.pieces.shared_bytes)
        return part, launch, functools.partial(self._num_returners, part)

    def _num_returners(self, part: _Part, num_tokens: int, num_rows: int) -> int:
        session = self._session
        # Of fixed outputs nobody knows here how many rows there are.
        is_known = session.world.max_recv_tokens is None
        return num_returners(
            session.num_sms * structs.PIPELINES,
            num_tokens,
            is_cut=part.pieces.piece_bytes < part.row_bytes,
            num_rows=num_rows // session.num_ranks if is_known else 0,
        )

    def _parts_of(self, form: str, rows: tuple[Tensor, ...]) -> list[_Part]:
        session = self._session
        returns_at, parts = session.constants.returns_at, []
        for each in rows:
            size = bytes_per_row(each)
            # All rows of a token must fit.
            pieces = cut(size, session.world.top_k, session.max_shared_bytes)
            parts.append(_Part(self._kernels(each.dtype), size, returns_at, pieces))
            returns_at += session.layout.num_returns * size
        self._parts[form] = parts
        return parts


def num_returners(num_pipelines: int, num_tokens: int, *, is_cut: bool, num_rows: int) -> int:
    """How many pipelines begin with returning; the others begin with summing.

    Tuned with all multiprocessors of an H200, and for ranks with as many tokens each.

    Args:
        num_pipelines: of all blocks.
        num_tokens: to sum.
        is_cut: whether rows come in pieces.
        num_rows: that each rank has sent here, on average; 0 where that is not known.
    """
    half = num_pipelines // 2
    has_one_item = num_tokens <= num_pipelines  # each, at the most
    if has_one_item or not is_cut:
        return half
    wanted = _RETURNERS_PER_ROW * num_rows // num_tokens
    return min(half, _RETURNERS) if wanted <= _RETURNERS else min(2 * num_pipelines // 3, wanted)


def cut(row_bytes: int, num_rows: int, max_shared_bytes: int) -> Cut:
    """Cut rows into as few pieces as let `num_rows` rows of a piece lie in each pipeline."""
    room = (max_shared_bytes - structs.COMBINE_SHARED_BYTES) // structs.PIPELINES
    num_pieces = -(-row_bytes // _MAX_PIECE_BYTES)
    while True:
        piece_bytes = round_up(-(-row_bytes // num_pieces), 16)
        num_slots = room // piece_bytes - structs.SENDERS
        if num_slots >= num_rows:
            break
        num_pieces += 1
    num_places = structs.PIPELINES * (num_slots + structs.SENDERS)
    return Cut(piece_bytes, num_slots, num_places * piece_bytes + structs.COMBINE_SHARED_BYTES)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
