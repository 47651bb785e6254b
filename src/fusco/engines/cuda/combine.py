"""Combine on GPUs: one kernel a tensor, of which the first agrees for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Returned
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.launch import Launcher
from fusco.engines.cuda.plans import Addresses
from fusco.engines.cuda.session import Session
from fusco.layout.compact import round_up
from fusco.layout.heap import NOTHING
from fusco.layout.segments import bytes_per_row
from fusco.plans import Plan

_TOKENS_AN_ITEM = 24
"""A pipeline takes one more item at a time for each so many tokens that it has."""


class Crew(NamedTuple):
    """The warps of a block.

    Attributes:
        num_pipelines: in a block.
        num_summers: warps of each that sum; 7 and 14 divide 7168 elements of 2 bytes.
        items_at_once: the most that each takes at a time, of tokens to sum or segments to return.
    """

    num_pipelines: int
    num_summers: int
    items_at_once: int

    @property
    def max_piece_bytes(self) -> int:
        """What the summing warps of a pipeline sum in one step: two vectors a thread."""
        return 2 * self.num_summers * 32 * 16

    @property
    def num_threads(self) -> int:
        """Of a block."""
        return self.num_pipelines * (1 + self.num_summers + structs.SENDERS) * 32


# Tuned on H200 in bfloat16 at hidden 7168, 2880 and 2048. A block does most by two pipelines. But
# of many blocks the one that ends last keeps all waiting, and where two would have to cut rows, one
# pipeline is sooner done with each.
TWO_PIPELINES = Crew(num_pipelines=2, num_summers=7, items_at_once=3)
ONE_PIPELINE = Crew(num_pipelines=1, num_summers=14, items_at_once=2)


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
    crew: Crew
    num_threads: int
    pieces: Cut


class Combiner:
    """Launches the kernels of a combine, and returns before they have run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._args = structs.CombineArgs()
        self._kernels = session.launchers("combine", self._args)
        self._has_many_blocks = session.num_sms > session.max_sms // 2
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
        session, args = self._session, self._args
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
            kernel, args.row_bytes, args.returns_at, crew, num_threads, pieces = part
            args.piece_bytes, args.num_slots, shared_bytes = pieces
            args.num_summers = crew.num_summers
            # Where there is little to do for each pipeline, it takes less at a time.
            share = num_tokens // (session.num_sms * crew.num_pipelines)
            args.items_at_once = min(crew.items_at_once, share // _TOKENS_AN_ITEM + 1)
            kernel(stream, session.num_sms, num_threads, shared_bytes)
            args.row_values = args.pair_values = 0
        return Returned(sums=sums, pair_values=pair_values)

    def _parts_of(self, form: str, rows: tuple[Tensor, ...]) -> list[_Part]:
        session = self._session
        top_k, num_ranks = session.world.top_k, session.num_ranks
        # All rows of a token must fit, and should twice where it goes to every rank, so that one is
        # fetched while the other is summed.
        need = max(top_k, 2 * -(-top_k // num_ranks))
        returns_at, parts = session.constants.returns_at, []
        for each in rows:
            size = bytes_per_row(each)
            crew, pieces = assign(
                size, need, session.max_shared_bytes, has_many_blocks=self._has_many_blocks
            )
            kernel = self._kernels(each.dtype)
            parts.append(_Part(kernel, size, returns_at, crew, crew.num_threads, pieces))
            returns_at += session.layout.num_returns * size
        self._parts[form] = parts
        return parts


def assign(
    row_bytes: int, num_rows: int, max_shared_bytes: int, *, has_many_blocks: bool
) -> tuple[Crew, Cut]:
    """The warps for rows of that size, and how they are cut; see `cut`."""
    pieces = cut(row_bytes, TWO_PIPELINES, num_rows, max_shared_bytes)
    if has_many_blocks and pieces.piece_bytes < row_bytes:
        return ONE_PIPELINE, cut(row_bytes, ONE_PIPELINE, num_rows, max_shared_bytes)
    return TWO_PIPELINES, pieces


def cut(row_bytes: int, crew: Crew, num_rows: int, max_shared_bytes: int) -> Cut:
    """Cut rows into as few pieces as let `num_rows` rows of a piece lie in each pipeline."""
    room = (max_shared_bytes - structs.COMBINE_SHARED_BYTES) // crew.num_pipelines
    num_pieces = -(-row_bytes // crew.max_piece_bytes)
    while True:
        piece_bytes = round_up(-(-row_bytes // num_pieces), 16)
        num_slots = room // piece_bytes - structs.SENDERS
        if num_slots >= num_rows:
            break
        num_pieces += 1
    num_places = crew.num_pipelines * (num_slots + structs.SENDERS)
    return Cut(piece_bytes, num_slots, num_places * piece_bytes + structs.COMBINE_SHARED_BYTES)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
