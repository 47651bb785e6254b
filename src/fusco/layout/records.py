"""The control record that every operation begins with: what a rank publishes to its group.

A record is int64 `[HEADER + payload]`; the payload holds the counts of a new plan, or the sizes
of an exchange.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Operation(IntEnum):
    """What a rank is about to do."""

    DISPATCH = 1
    DISPATCH_PLANNED = 2
    COMBINE = 3
    COMBINE_BACKWARD = 4
    DISPATCH_BACKWARD = 5
    EXCHANGE = 6

    @property
    def text(self) -> str:
        """As a user reads it, such as `combine backward`."""
        return self.name.lower().replace("_planned", "").replace("_", " ")


class Status(IntEnum):
    """Whether a rank can go on."""

    READY = 0
    BAD_INPUT = 1
    NO_MEMORY = 2


@dataclass(frozen=True, kw_only=True)
class Header:
    """The head of a record.

    Attributes:
        epoch: how many operations the group has begun, this one included.
        operation: an `Operation`.
        status: a `Status`.
        plan: the number of the plan in use; -1 where a new one is made.
        signature: a hash of what must be equal on all ranks, such as row formats.
        base: where in this rank's window the block reserved for what it receives begins, bytes.
        capacity: the size of that block, bytes.
    """

    epoch: int
    operation: int
    status: int
    plan: int
    signature: int
    base: int = 0
    capacity: int = 0

    def pack(self, record: npt.NDArray[np.int64]) -> None:
        """Write the header into the head of a record."""
        record[:HEADER] = astuple(self)

    @classmethod
    def unpack(cls, record: npt.NDArray[np.int64]) -> Header:
        """Read it back."""
        return cls(**dict(zip(_NAMES, record[:HEADER].tolist(), strict=True)))


_NAMES = tuple(field.name for field in fields(Header))
HEADER = len(_NAMES)
