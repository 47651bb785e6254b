"""How all ranks come to the same conclusion: go on, or raise the same error."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fusco.errors import (
    DisagreementError,
    FuscoError,
    InputError,
    WindowMemoryError,
)
from fusco.layout.records import ALIKE, Field, Operation, Status

Made = TypeVar("Made")


class Call(NamedTuple):
    """What this rank is about to do, before it has asked the others.

    Attributes:
        operation: which operation.
        plan: the number of the plan in use; -1 where a new one is made.
        form: in words, all that must be equal on every rank, row formats among it.
        error: what is wrong with this rank's arguments, if anything.
    """

    operation: Operation
    plan: int = -1
    form: str = ""
    error: InputError | WindowMemoryError | None = None

    def head(self, epoch: int, base: int = 0, capacity: int = 0) -> tuple[int, ...]:
        """The head of the record to publish, in the order of `Field`."""
        signature = _signature(self.form)
        return epoch, self.operation, self._status, self.plan, signature, base, capacity

    def failed(self, error: WindowMemoryError) -> Call:
        """The same call, which this rank cannot make."""
        return self._replace(error=self.error or error)

    @property
    def _status(self) -> Status:
        if self.error is None:
            return Status.READY
        return Status.NO_MEMORY if isinstance(self.error, MemoryError) else Status.BAD_INPUT

    @property
    def text(self) -> str:
        """What to tell the others when something is wrong."""
        if self.error is not None:
            return str(self.error)
        plan = "a new plan" if self.plan < 0 else f"plan {self.plan}"
        return f"{self.operation.text} with {plan}" + (f", {self.form}" if self.form else "")


@functools.lru_cache(maxsize=256)
def _signature(form: str) -> int:
    return zlib.crc32(form.encode())


def make_on_all(
    make: Callable[[], Made],
    swap: Callable[[str], Sequence[str]],
    ranks: Sequence[int] | None = None,
    *,
    untold: tuple[type[Exception], ...] = (),
) -> tuple[Made | None, str]:
    """Make something on every rank, or learn on every rank that it is not there on some.

    Args:
        make: makes it, or raises.
        swap: tells all ranks a text and returns everybody's, in their order.
        ranks: all of them; None: those of the group.
        untold: errors that are raised at once, since the others cannot be told.

    Returns:
        what this rank made, None where it could not; and what went wrong on which ranks, empty
        where nothing did.
    """
    made, problem = None, ""
    try:
        made = make()
    except untold:
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is, the others wait for this rank)
        problem = str(error) or type(error).__name__
    texts = swap(problem)
    told = zip(ranks or range(len(texts)), texts, strict=True)
    return made, "; ".join([f"rank {rank}: {text}" for rank, text in told if text])


def is_agreed(records: npt.NDArray[np.int64]) -> bool:
    """Whether all ranks published the same operation, each of them ready.

    Args:
        records: int64 `[P, HEADER + payload]`.
    """
    heads = records[:, ALIKE]
    return bool((heads == heads[0]).all() and heads[0, Field.STATUS] == Status.READY)


def disagreement(
    call: Call, records: npt.NDArray[np.int64], texts: list[str], rank: int
) -> FuscoError:
    """The error that every rank raises after records that are not agreed."""
    if call.error is not None:
        return call.error
    for peer, status in enumerate(records[:, Field.STATUS].tolist()):
        if status != Status.READY:
            kind = WindowMemoryError if status == Status.NO_MEMORY else InputError
            return kind(f"rank {peer}: {texts[peer]}")
    by_text: dict[str, list[str]] = {}
    for peer, text in enumerate(texts):
        by_text.setdefault(text, []).append(str(peer))
    calls = "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in by_text.items())
    return DisagreementError(
        f"{call.operation.text}: the ranks' calls do not fit together ({calls}); "
        f"every rank must make the same calls in the same order (this is rank {rank})"
    )
