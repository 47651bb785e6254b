"""The control record that every operation begins with: what a rank publishes to its group.

A record is int64 `[HEADER + payload]`; the payload holds the counts of a new plan, or the sizes
of an exchange.
"""

from __future__ import annotations

from enum import IntEnum


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
        return _TEXT[self]

    @property
    def sums(self) -> bool:
        """Whether it brings rows back to their tokens and sums them."""
        return self in (Operation.COMBINE, Operation.DISPATCH_BACKWARD)


_TEXT = {each: each.name.lower().replace("_planned", "").replace("_", " ") for each in Operation}


class Status(IntEnum):
    """Whether a rank can go on. `PENDING`: not before it has raised an earlier failure."""

    READY = 0
    BAD_INPUT = 1
    NO_MEMORY = 2
    PENDING = 3


class Field(IntEnum):
    """Where each number of a record's head lies.

    `EPOCH` counts the operations the group has begun, this one included. `PLAN` is the number of
    the plan in use, -1 where a new one is made. `SIGNATURE` is a hash of what must be equal on
    all ranks, such as row formats. `BASE` and `CAPACITY` say where in this rank's window the
    block reserved for what it receives begins and how large it is, bytes.
    """

    EPOCH = 0
    OPERATION = 1
    STATUS = 2
    PLAN = 3
    SIGNATURE = 4
    BASE = 5
    CAPACITY = 6


HEADER = len(Field)
ALIKE = slice(Field.EPOCH, Field.BASE)
"""The part of the head that all ranks must publish alike."""
