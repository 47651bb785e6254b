"""Combine on GPUs: one kernel a tensor, of which the first agrees for all."""

from __future__ import annotations

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.base import Returned
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.session import Session
from fusco.engines.cuda.window import NOWHERE
from fusco.layout.compact import round_up
from fusco.layout.segments import bytes_per_row
from fusco.types import CompactPlan

_MAX_PIECE_BYTES = 2 * structs.GROUP_WARPS * 32 * 16
"""What a group of warps sums in one step."""
_NUM_BUFFERS = structs.SENDERS * structs.BUFFERS
_THREADS = (1 + structs.GROUPS * structs.GROUP_WARPS + structs.SENDERS) * 32
_ITEMS_AT_ONCE = 4


class Combiner:
    """Launches the kernels of a combine, and returns before they have run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._args = structs.CombineArgs()
        self._kernels = session.launchers("combine", self._args)

    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: CompactPlan,
        row_values: Tensor | None,
    ) -> Returned:
        """See `Engine.combine`."""
        session, args = self._session, self._args
        stream = session.order.begin()
        kernels = [self._kernels(each.dtype) for each in rows]
        num_tokens = plan.num_tokens
        pair_values = None
        try:
            sums = tuple(each.new_empty((num_tokens, *each.shape[1:])) for each in rows)
            if row_values is not None:
                pair_values = row_values.new_empty((num_tokens, plan.top_k))
        except torch.OutOfMemoryError as error:
            session.raise_out_of_memory(call, error)
        session.describe(call, NOWHERE)
        args.row_values, args.pair_values = _address(row_values), _address(pair_values)
        args.row_weights = _address(row_weights)
        args.pairs, args.links = plan.pairs.data_ptr(), plan.links.data_ptr()
        args.num_tokens = num_tokens
        # Where there is little to do for each block, it takes less at a time.
        args.items_at_once = min(_ITEMS_AT_ONCE, 2 * num_tokens // (60 * session.num_sms) + 1)
        args.returns_at = session.constants.returns_at
        for part, (each, out) in enumerate(zip(rows, sums, strict=True)):
            args.rows, args.out = each.data_ptr(), out.data_ptr()
            args.row_bytes = bytes_per_row(each)
            args.part, args.is_last = part, part == len(rows) - 1
            shared_bytes = self._share(args.row_bytes)
            kernels[part](stream, session.num_sms, _THREADS, shared_bytes)
            args.returns_at += session.layout.num_returns * args.row_bytes
            args.row_values = args.pair_values = 0
        return Returned(sums=sums, pair_values=pair_values)

    def _share(self, row_bytes: int) -> int:
        """Cut rows into pieces and shared memory into places for them; bytes of shared memory.

        Two tokens' rows should fit, so that one is fetched while the other is summed.
        """
        session, args = self._session, self._args
        room = session.max_shared_bytes - structs.COMBINE_SHARED_BYTES
        num_pieces = -(-row_bytes // _MAX_PIECE_BYTES)
        while True:
            piece_bytes = round_up(-(-row_bytes // num_pieces), 16)
            num_slots = room // piece_bytes - _NUM_BUFFERS
            if num_slots >= 2 * session.world.top_k:
                break
            num_pieces += 1
        args.piece_bytes, args.num_slots = piece_bytes, num_slots
        return (num_slots + _NUM_BUFFERS) * piece_bytes + structs.COMBINE_SHARED_BYTES


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
