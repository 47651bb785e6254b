"""The layout of a compact plan and its `links`, of a dispatch's block, and of a GPU's window.

`engines/cuda/kernels/links.cuh` reads links and a dispatch's block by the same rules; a test holds
them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ALIGNMENT = 128
"""Bytes; each tensor of a dispatch begins at a multiple of it."""
RECORD_HEAD = 8
"""int64 before the counts of a record: `records.Field`, and the chunk of the block."""

# The driver maps memory in such pieces; and the next load will be a little larger.
_CHUNK_UNIT = 2 << 20
_GROWTH = 1.25


@dataclass(frozen=True, kw_only=True, eq=False)
class Links:
    """The parts of `CompactPlan.links`, int32.

    Attributes:
        number: `[1]`, the same on all ranks and for no other plan; 0: they did not agree on it, and
            the rest means nothing.
        sends: `[P]`, segments sent to each rank, the own one included.
        arrivals: `[P]`, segments that arrive from each rank, the own one included.
        rows: `[P]`, rows that each rank receives, padding counted.
        return_at: `[P]`, where this rank's partials begin among the rows returned to each rank.
        return_from: `[P]`, where each rank's partials begin among the rows returned to this one.
        token_segment: `[T, P]`, the number of a token's segment among those sent to a rank; -1
            where none is sent.
        arrival_slot: `[P, max_tokens, K]`, the slots of each segment that arrives, -1 behind the
            last.
    """

    number: Tensor
    sends: Tensor
    arrivals: Tensor
    rows: Tensor
    return_at: Tensor
    return_from: Tensor
    token_segment: Tensor
    arrival_slot: Tensor

    @classmethod
    def split(cls, links: Tensor, num_tokens: int, num_ranks: int, top_k: int) -> Links:
        """The parts of a plan's `links`."""
        head = links[1 : 1 + 5 * num_ranks].view(5, num_ranks)
        rest = links[1 + 5 * num_ranks :]
        token_segment = rest[: num_tokens * num_ranks].view(num_tokens, num_ranks)
        arrival_slot = rest[num_tokens * num_ranks :].view(num_ranks, -1, top_k)
        return cls(
            number=links[:1],
            sends=head[0],
            arrivals=head[1],
            rows=head[2],
            return_at=head[3],
            return_from=head[4],
            token_segment=token_segment,
            arrival_slot=arrival_slot,
        )

    def join(self) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([getattr(self, field.name).flatten() for field in fields(self)])


def links_len(num_tokens: int, num_ranks: int, max_tokens: int, top_k: int) -> int:
    """Length of a plan's `links`."""
    return 1 + num_ranks * (5 + num_tokens + max_tokens * top_k)


class PlanLayout(NamedTuple):
    """Where the arrays of a compact plan begin in a block, bytes; the tokens per expert come first.

    Attributes:
        num_tokens: T.
        top_k: K.
        num_local: L.
        links_len: length of its `links`.
        expert_offsets, pairs, links: where each begins.
        end: where the last ends.
    """

    num_tokens: int
    top_k: int
    num_local: int
    links_len: int
    expert_offsets: int
    pairs: int
    links: int
    end: int

    @classmethod
    def of(
        cls, *, num_tokens: int, top_k: int, num_local: int, num_ranks: int, max_tokens: int
    ) -> PlanLayout:
        """Of the plans of one rank."""
        size = links_len(num_tokens, num_ranks, max_tokens, top_k)
        starts = [0]
        for num_bytes in (8 * num_local, 4 * (num_local + 1), 8 * num_tokens * top_k, 4 * size):
            starts.append(starts[-1] + round_up(num_bytes))
        return cls(num_tokens, top_k, num_local, size, *starts[1:])


def round_up(size: int, unit: int = BLOCK_ALIGNMENT) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit


def chunk_bytes(need: int) -> int:
    """How large a piece is by which a heap grows so that a block of `need` bytes fits."""
    return round_up(int(need * _GROWTH), _CHUNK_UNIT)


def part_starts(row_bytes: Sequence[int], num_rows: int) -> list[int]:
    """Where each tensor of a dispatch begins in its block, then the row weights, then the end."""
    starts = [0]
    for size in (*row_bytes, 4):
        starts.append(starts[-1] + round_up(num_rows * size))
    return starts


@dataclass(frozen=True, kw_only=True)
class WindowLayout:
    """Byte offsets in a GPU's window: what peers write besides the rows of a dispatch.

    Attributes:
        num_ranks: P.
        num_experts: E.
        max_tokens: the most tokens a rank dispatches.
        top_k: K.
        row_bytes: of the widest row that is returned.
        max_parts: tensors that are returned at once.
    """

    num_ranks: int
    num_experts: int
    max_tokens: int
    top_k: int
    row_bytes: int
    max_parts: int

    @property
    def num_returns(self) -> int:
        """The most partials that other ranks return to one."""
        return self.max_tokens * min(self.top_k, self.num_ranks - 1)

    @property
    def record_bytes(self) -> int:
        """Of one record: its head in int64, and its counts in int32."""
        return round_up(RECORD_HEAD * 8 + (self.num_experts + self.num_ranks) * 4)

    def offsets(self) -> dict[str, int]:
        """Where each part begins, and the size of all under "end"."""
        segments = self.num_ranks * self.max_tokens
        sizes = {
            "records_at": 2 * self.num_ranks * self.record_bytes,
            "record_flags_at": 2 * self.num_ranks * 8,
            "arrival_flags_at": segments * 8,
            "shipments_at": segments * self.top_k * 8,
            "return_flags_at": self.max_parts * self.num_returns * 8,
            "values_at": self.num_returns * self.top_k * 4,
            "returns_at": self.num_returns * self.row_bytes,
        }
        at, found = 0, {}
        for name, size in sizes.items():
            found[name] = at
            at += round_up(size)
        return found | {"end": at}
