"""The errors fusco raises. Each says the operation, the argument, what came, what was expected,
and what to do."""

from __future__ import annotations


class FuscoError(RuntimeError):
    """Base of every error that fusco raises on purpose."""


class InputError(FuscoError, ValueError):
    """An argument is wrong on some rank. Raised on every rank; the next correct call works."""


class DisagreementError(FuscoError):
    """Ranks called with arguments that do not fit together. Raised on every rank; the next
    correct call works."""


class EngineUnavailableError(FuscoError):
    """The engine asked for cannot run here."""


class WindowMemoryError(FuscoError, MemoryError):
    """A rank has no memory left to grow its window. Raised on every rank; smaller calls work."""


class ClosedError(FuscoError):
    """The Shuffle was closed, by its owner or by an earlier failure."""


class PeerError(FuscoError):
    """A rank died or did not arrive in time. The Shuffle that raised it is closed for good.

    Attributes:
        operation: what was running, such as `dispatch`.
        rank: the rank, in its group, that was waited for.
    """

    def __init__(self, message: str, *, operation: str, rank: int) -> None:
        super().__init__(message)
        self.operation = operation
        self.rank = rank


def closed_error() -> ClosedError:
    """What a call of a closed Shuffle raises, and a backward through one."""
    return ClosedError(
        "Shuffle: it was closed, or a rank was lost; make a new one, and leave it open until the "
        "last backward is done"
    )


def input_error(
    operation: str, argument: str, *, got: str, expected: str, remedy: str
) -> InputError:
    """The one form in which a bad argument is described."""
    return InputError(f"{operation}: {argument}: got {got}, expected {expected}; {remedy}")
