"""Hops over a mailbox: what a sender's leg says, in messages, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fusco.legs import Arrival, Leg
from fusco.planner import HopSizes, assemble
from fusco.planner.legs import shipment
from fusco.transports.mailbox import Mailbox


def ship_slots(mailbox: Mailbox, leg: Leg, sizes: HopSizes, *, operation: str) -> Arrival:
    """Send every peer the slot lists of its segments; what arrives mirrors the peers' legs."""
    rank, num_ranks = mailbox.group.rank(), mailbox.group.size()
    segments, pairs = sizes.segments[:, rank].tolist(), sizes.pairs[:, rank].tolist()
    sends = [torch.cat(shipment(leg, peer)) for peer in range(num_ranks)]
    receives = [leg.slot.new_empty(n + 2 * m) for n, m in zip(segments, pairs, strict=True)]
    mailbox.swap(sends, receives, operation=operation)
    shipped = [
        (message[:n], message[n : n + m], message[n + m :])
        for message, n, m in zip(receives, segments, pairs, strict=True)
    ]
    return assemble(sizes, rank, shipped)


class Hop:
    """One hop of a plan, in both directions. `values` have one row a segment or a pair."""

    def __init__(self, mailbox: Mailbox, leg: Leg, arrival: Arrival, operation: str) -> None:
        self.mailbox = mailbox
        self.leg = leg
        self.arrival = arrival
        self.operation = operation

    def send_segments(self, rows: Tensor) -> Tensor:
        """Rows of this rank `[rows, ...]` to the segments that arrive `[n', ...]`."""
        return self._swap(rows[self.leg.row], self.leg.peer_ptr, self.arrival.peer_ptr)

    def return_segments(self, arrived: Tensor) -> Tensor:
        """One row an arrived segment `[n', ...]` back to the segments sent `[n, ...]`."""
        return self._swap(arrived, self.arrival.peer_ptr, self.leg.peer_ptr)

    def send_pairs(self, values: Tensor) -> Tensor:
        """One value a pair of this rank's rows to the slots that arrive `[m']`."""
        return self._swap(values[self.leg.pair], *self._pair_bounds())

    def return_pairs(self, arrived: Tensor) -> Tensor:
        """One value an arrived slot `[m']` back to the pairs sent `[m]`."""
        return self._swap(arrived, *reversed(self._pair_bounds()))

    def _pair_bounds(self) -> tuple[Tensor, Tensor]:
        leg, arrival = self.leg, self.arrival
        return leg.slot_ptr[leg.peer_ptr], arrival.slot_ptr[arrival.peer_ptr]

    def _swap(self, values: Tensor, send_ptr: Tensor, receive_ptr: Tensor) -> Tensor:
        received = values.new_empty(int(receive_ptr[-1]), *values.shape[1:])
        self.mailbox.swap(
            _cut(values.contiguous(), send_ptr),
            _cut(received, receive_ptr),
            operation=self.operation,
        )
        return received


def _cut(values: Tensor, ptr: Tensor) -> list[Tensor]:
    return list(values.split(ptr.diff().tolist()))
