"""What kernels report that went wrong, and the errors that it becomes."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fusco.engines.agreement import Call, disagreement
from fusco.engines.base import World
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.kernels.structs import Verdict
from fusco.engines.ids import bad_ids
from fusco.errors import (
    DisagreementError,
    FuscoError,
    PeerError,
    WindowMemoryError,
    input_error,
)
from fusco.layout.records import HEADER, Field, Operation, Status
from fusco.transports.bulletin import Bulletin

_REMEMBERED = 64
_LOST = int(Verdict.LOST)  # members of enumerations are slow to look up


class Failures:
    """Failures of one rank's kernels.

    A failure that all ranks find together stays pending, and no operation does anything, until
    every rank has settled it: has raised it in a call that waits for the device. Such calls are
    the same on all ranks, so that all raise in the same call, and their next ones belong together,
    however late a rank's host learns of a failure. Where one rank waits and another does not, the
    first raises at once, and again with the other. With fixed outputs only `synchronize` waits, and
    until then calls ask the others for nothing.

    Args:
        world: what the engine is made for.
        bulletin: where the ranks tell each other what they had asked for.
        told: int64, the `structs.Failure` that kernels write, in host memory.
        pending: int32 `[1]` on the device, whether kernels have written it.
        head_of: the head of the record that a rank has published for an operation, in the order
            of `Field`, by epoch and rank; or that of a later one.
    """

    def __init__(
        self,
        world: World,
        bulletin: Bulletin,
        told: npt.NDArray[np.int64],
        pending: Tensor,
        head_of: Callable[[int, int], Sequence[int]],
    ) -> None:
        self._world = world
        self._bulletin = bulletin
        self._told = told
        self._words = told.data  # the same memory, read faster
        self._pending = pending
        self._head_of = head_of
        # NOTE: what is raised is never what is kept, for it holds the frames that it has passed,
        # with all tensors there, and this object.
        self.calls: deque[tuple[int, Call]] = deque(maxlen=_REMEMBERED)
        self._last: FuscoError | None = None
        self._has_warned = False

    @property
    def is_pending(self) -> bool:
        """Whether there is something to raise."""
        return bool(self._words[0])

    @property
    def _has_to_settle(self) -> bool:
        return self.is_pending and self._words[0] != _LOST

    def remember(self, ticket: int, call: Call) -> None:
        """Keep what a ticket stands for."""
        if call.error is not None:
            call = call._replace(error=copy(call.error))
        self.calls.append((ticket, call))

    def raise_lost(self) -> None:
        """Raise if a rank is lost, which is for good.

        Raises:
            PeerError: it did not come, or not with what it should bring.
        """
        if self._words[0] == _LOST:
            raise self._lost(self._read())

    def raise_pending(self) -> None:
        """Raise what is pending, if anything, which settles it.

        Raises:
            InputError, DisagreementError, WindowMemoryError: the ranks did not agree.
            PeerError: as `raise_lost`.
        """
        self.raise_lost()
        if not self.is_pending:
            return
        self._last = self._error_of(self._read())
        self._settle()
        raise copy(self._last)

    def raise_reported(self, verdict: int) -> NoReturn:
        """Raise what a kernel has reported; what it tells may be a moment behind the report."""
        deadline = time.monotonic() + self._world.timeout_s
        # A loss takes the place of what was pending.
        while not (self._told[0] == _LOST if verdict == _LOST else self.is_pending):
            if time.monotonic() > deadline:
                break
        self.raise_pending()
        raise AssertionError("a kernel reported a failure that it did not tell")

    def warn(self) -> None:
        """Say once for each failure that nothing is done until it is raised."""
        if not self._has_to_settle or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            "an earlier call of this Shuffle failed, and no call since has done anything: "
            "synchronize() raises the error, on all ranks alike",
            stacklevel=2,
        )

    def raise_own(self, ticket: int, call: Call, *, all_settle: bool) -> NoReturn:
        """Raise the error of a call that was published with it, on the rank that made it.

        Args:
            ticket: of the call.
            call: with an error.
            all_settle: whether the other ranks settle what is pending in this call.
        """
        self.raise_lost()
        assert call.error is not None
        failure = self._read()
        is_first = failure.ticket == ticket
        if is_first and failure.verdict == Verdict.UNLIKE:
            self._post(failure, call)
            self._last = copy(call.error)
        if is_first:
            self._settle()
        elif all_settle:
            self.raise_pending()
        raise copy(call.error) from None

    def close(self) -> None:
        """Tell the others what they will ask for, and warn, if this rank leaves before it has
        raised."""
        if not self._has_to_settle:
            return
        failure = self._read()
        if failure.verdict == Verdict.UNLIKE:
            self._post(failure, self._call_of(failure))
            # What others called is not asked for: nobody waits here any more.
            what = f"{Operation(failure.operation).text}: the ranks' calls did not fit together"
        else:
            what = str(self._error_of(failure))
        warnings.warn(
            "a Shuffle was closed before synchronize() raised why no call since has done "
            f"anything: {what}",
            stacklevel=2,
        )

    def _settle(self) -> None:
        self._has_warned = False
        self._told[:] = 0
        self._pending.zero_()

    def _read(self) -> structs.Failure:
        return structs.Failure(*map(int, self._told))

    def _lost(self, failure: structs.Failure) -> PeerError:
        operation = Operation(failure.operation)
        rank, awaited = self._world.topology.rank, failure.awaited
        timeout = f"{self._world.timeout_s:g} s"
        if failure.item < 0:
            what = "its call"
        elif operation.sums:
            what = f"its sum for token {failure.item} of {failure.need}"
        else:
            what = f"row {failure.item} of the {failure.need} that it sends"
        if awaited == rank:
            problem = (
                f"rank {rank} cannot go on: other work has kept its blocks from the GPU for "
                f"{timeout} or more"
            )
        else:
            problem = (
                f"rank {awaited} is lost: {what} did not arrive within {timeout} "
                f"(waited for by rank {rank})"
            )
        return PeerError(
            f"{operation.text}: {problem}; this Shuffle is closed for good, restart the ranks",
            operation=operation.text,
            rank=awaited,
        )

    def _error_of(self, failure: structs.Failure) -> FuscoError:
        operation = Operation(failure.operation).text
        if failure.verdict == Verdict.SHORT:
            return WindowMemoryError(
                f"{operation}: a rank receives {failure.need} rows, more than "
                f"max_recv_tokens={self._world.max_recv_tokens}; nothing was received; make the "
                f"Shuffle with max_recv_tokens={failure.need} or more, or balance the routing"
            )
        if failure.verdict == Verdict.INVALID:
            return input_error(
                operation,
                "plan",
                got="that of a dispatch which raised an error",
                expected="that of one which did not",
                remedy="dispatch again",
            )
        if failure.verdict == Verdict.STALE:
            # What others have still to raise is what this rank has raised last.
            return self._last or DisagreementError(
                f"{operation}: not carried out, for a rank has still to raise an earlier error"
            )
        return self._disagreement(failure)

    def _disagreement(self, failure: structs.Failure) -> FuscoError:
        world, call = self._world, self._call_of(failure)
        rank, num_ranks = world.topology.rank, world.topology.num_ranks
        self._post(failure, call)
        if call.error is not None:
            return call.error
        letters = [self._letter_of(failure, each) for each in range(num_ranks)]
        records = np.zeros((num_ranks, HEADER), dtype=np.int64)
        records[:, Field.STATUS] = [int(letter[0]) for letter in letters]
        return disagreement(call, records, [letter[1:] for letter in letters], rank)

    def _letter_of(self, failure: structs.Failure, rank: int) -> str:
        """What a rank had asked for: its status and words."""
        epoch, operation, status, plan, *_ = self._head_of(failure.epoch, rank)
        if not Operation(failure.operation).sums and epoch == failure.epoch:
            call = Call(Operation(operation), plan)
            # Its host goes on, and may wait for this rank before it has anything to tell.
            if status == Status.READY and call.operation.sums:
                return _letter(call)
        return self._bulletin.read(_topic(failure), rank)

    def _call_of(self, failure: structs.Failure) -> Call:
        world = self._world
        call = dict(self.calls).get(failure.ticket) or Call(
            operation=Operation(failure.operation), form="too long ago to say with what"
        )
        if failure.awaited == world.topology.rank:
            ids = bad_ids(failure.item, failure.need, world.topology.num_experts)
            call = call._replace(error=ids)
        return call

    def _post(self, failure: structs.Failure, call: Call) -> None:
        self._bulletin.post(_topic(failure), _letter(call))


def _letter(call: Call) -> str:
    return f"{int(call.head(0)[Field.STATUS])}{call.text}"


def _topic(failure: structs.Failure) -> str:
    # Epochs count the same on all ranks; tickets do not, where graphs are replayed.
    return f"operation {failure.epoch}"
