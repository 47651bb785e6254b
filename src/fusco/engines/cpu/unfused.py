"""What fusion saves: the same transfers with a permute before and a permute after (for the
ablation of FUSCO, section 5.4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fusco.engines.cpu.kernels.memory import copy
from fusco.engines.cpu.plans import ArrayPlan, LegArrays
from fusco.layout.blocks import Ints
from fusco.layout.segments import as_segments


def write_device_major(
    rows: Sequence[Tensor], leg: LegArrays, top_k: int, at: Ints, first: Ints
) -> None:
    """Pack rows by destination and copy each rank's into its window in one piece.

    Args:
        rows: tensors `[T, ...]`.
        leg: of this rank.
        top_k: K.
        at: int64 `[sections, P]`, address of each tensor's rows on each rank.
        first: int64 `[P]`, how many rows the ranks before this one send to each rank.
    """
    token = torch.from_numpy(leg.pair // top_k)
    bounds = leg.slot_ptr[leg.peer_ptr].tolist()
    for each, base in zip(rows, at, strict=False):
        packed = as_segments(each).index_select(0, token)
        row_bytes = packed.shape[1]
        for peer, (begin, end) in enumerate(itertools.pairwise(bounds)):
            to = base[peer] + first[peer] * row_bytes
            copy(to, packed.data_ptr() + begin * row_bytes, (end - begin) * row_bytes)


def expert_major(arrived: Tensor, plan: ArrayPlan) -> Tensor:
    """Rows in order of arrival, uint8 `[R, bytes]` with padding last, permuted to their slots."""
    slot = torch.from_numpy(plan.incoming.slot)
    return torch.zeros_like(arrived).index_copy_(0, slot, arrived[: slot.shape[0]])


def in_order_of_arrival(
    rows: tuple[Tensor, ...], row_weights: Tensor | None, plan: ArrayPlan, rank: int
) -> tuple[tuple[Tensor, ...], Tensor | None, ArrayPlan]:
    """Rows and weights permuted back to the order in which they arrived, and a plan that finds
    them there."""
    leg, incoming = plan.leg, plan.incoming
    slots = torch.from_numpy(incoming.slot)
    permuted = tuple(each.index_select(0, slots) for each in rows)
    weights = None if row_weights is None else row_weights[slots]
    place = np.arange(incoming.slot.size)
    own_arrived = incoming.slot_ptr[incoming.peer_ptr[rank : rank + 2]].tolist()
    own_sent = leg.slot_ptr[leg.peer_ptr[rank : rank + 2]].tolist()
    slot = leg.slot.copy()
    slot[slice(*own_sent)] = place[slice(*own_arrived)]
    moved = replace(plan, leg=leg._replace(slot=slot), incoming=incoming._replace(slot=place))
    return permuted, weights, moved
