"""What an engine promises. Read this before adding one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.gradients import weigh_gradients
from fusco.engines.meter import Meter
from fusco.errors import FuscoError, PeerError, closed_error, input_error
from fusco.layout.records import HEADER
from fusco.plans import Plan, SegmentPlan
from fusco.topology import Topology
from fusco.types import Ablation, Dispatched, Segments, Stats

Result = TypeVar("Result")
TEXT_BYTES = 2048
"""Longest text a rank can tell the others when something is wrong; the rest is cut."""
_COMPILE_S = 180.0


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What an engine is made for.

    Attributes:
        group: the ranks that take part; no other group is created.
        topology: ranks, nodes and placement.
        key: the number that plans carry as the mark of their Shuffle.
        top_k: K.
        max_tokens: the most tokens a rank dispatches at once; 0 where no plans are made.
        row_bytes: the most bytes a row may have, over all tensors of a tuple.
        max_recv_tokens: rows that a rank always has room for, with outputs of that size; None: as
            many as arrive.
        num_sms: multiprocessors of a GPU that an operation may take; None: all.
        alignment: every expert's rows are padded to a multiple of it.
        timeout_s: bound of every wait, seconds.
        ablation: mechanisms that are switched off.
        channel: tells its messages from those of others that the group's ranks make engines for.
    """

    group: dist.ProcessGroup
    topology: Topology
    key: int
    top_k: int
    max_tokens: int
    row_bytes: int
    max_recv_tokens: int | None = None
    num_sms: int | None = None
    alignment: int
    timeout_s: float
    ablation: Ablation
    channel: int = 0

    @property
    def making_timeout_s(self) -> float:
        """Bound of the waits while an engine is made, seconds: kernels compile once a machine."""
        return max(self.timeout_s, _COMPILE_S)

    @property
    def payload(self) -> int:
        """Length of a record's payload: the counts of a plan, or the sizes of an exchange."""
        ranks = self.topology.num_ranks
        counts = self.topology.num_experts + ranks + self.topology.num_nodes
        return max(counts, EXCHANGE_FIELDS * ranks, COMBINE_FIELDS)

    @property
    def record_len(self) -> int:
        """Length of a record in int64."""
        return HEADER + self.payload


VALUE_ROW_BYTES = 16
"""Of the rows that go back beside values where no others do: as few as every engine takes, but
perhaps more than a row of the Shuffle has."""

COMBINE_FIELDS = 5
"""What a rank may say of a combine: segments and values it gets back, where its rows and their
weights can be read, and where both have ended."""

EXCHANGE_FIELDS = 3
"""What a rank says of its segments for each peer: their number, bytes, and a hash of sizes."""


class Delivery(NamedTuple):
    """What a dispatch brings.

    Attributes:
        rows: one tensor `[R, ...]` for each that was dispatched, expert-major, zero on padding.
        row_weights: float32 `[R]`, 1 where no weights were given, 0 on padding.
        plan: the plan used or made.
    """

    rows: tuple[Tensor, ...]
    row_weights: Tensor
    plan: Plan


class Returned(NamedTuple):
    """What a combine brings.

    Attributes:
        sums: one tensor `[T, ...]` for each that was combined.
        pair_values: float32 `[T, K]`, each pair's entry of `row_values`; 0 where there is no
            expert. None where none were given.
    """

    sums: tuple[Tensor, ...]
    pair_values: Tensor | None


class FastPath(Protocol):
    """A shorter way for plain calls whose like has been served before; None: it does not serve one.

    Forms of calls (`Call.form`) that are made in a graph of autograd say so.
    """

    dispatch: Callable[[Any, Any, Any], Dispatched[Any] | None]
    """Of `x`, `topk_idx` and `topk_weights`, of which no gradients are wanted."""
    dispatch_in_graph: Callable[[str, Any, Any, Any], Dispatched[Any] | None]
    """Of a form, and the same; what comes is in no graph yet."""
    combine: Callable[[Any, Any], Tensor | None]
    """Of rows and what was dispatched; no gradients are wanted. Weighted."""
    combine_in_graph: Callable[[str, Any, Any, Any], Tensor | None]
    """Of a form, rows, their weights, and the plan; what comes is in no graph yet."""

    def know_dispatch(
        self, form: str, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, in_graph: bool
    ) -> None:
        """Serve dispatches like this one from now on."""

    def know_combine(self, form: str, rows: Tensor, *, in_graph: bool) -> None:
        """Serve weighted combines like this one from now on."""

    def close(self) -> None:
        """Serve nothing any more."""


ENGINES: dict[int, Engine] = {}
"""The engines of all open Shuffles, by `World.key`."""


class Engine(ABC):
    """Moves rows between the ranks of one group.

    All methods but `stats` and `close` are collective. Each begins by publishing a record
    (`Call.head`, and counts or sizes) and waiting for everybody's; from the same records all
    ranks go on or raise the same error, after which the next call works. After a `PeerError` the
    engine is dead.
    Row order and sums never depend on arrival.
    """

    name: ClassVar[str]
    finds_bad_ids: ClassVar[bool] = False
    """Whether `dispatch` itself raises for expert ids out of range; else others check them."""
    has_compact_plans: ClassVar[bool] = False
    """Whether its plans are of the kind `CompactPlan`."""
    row_unit_bytes: ClassVar[int] = 1
    """Rows must be a multiple of so many bytes."""
    max_parts: ClassVar[int | None] = None
    """The most tensors of a tuple that are moved at once; None: any number."""

    plan_type: ClassVar[type[Plan]] = SegmentPlan
    """The kind of plan it makes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.meter = Meter(world.topology.num_ranks)
        self.fast_path: FastPath | None = None
        self._num_plans = 0
        self._epoch_before = 0

    def __enter__(self) -> Engine:
        """An operation begins; a rank that is lost in it closes the engine for good.

        Raises:
            ClosedError: it is closed.
        """
        if self.is_closed:
            raise closed_error()
        self._epoch_before = self.epoch
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PeerError):
            self.close(lost=error.rank)
        elif error is not None and not isinstance(error, FuscoError) and self._is_counted_on:
            # Out of memory perhaps, or interrupted. To those that wait its next call would look
            # like the rest of this one.
            self.close(lost=self.world.topology.rank)
        if error is not None and self.is_closed:
            ENGINES.pop(self.world.key, None)

    @property
    @abstractmethod
    def device_types(self) -> tuple[str, ...]:
        """Kinds of device whose tensors it takes."""

    @property
    def device(self) -> torch.device | None:
        """The only device whose tensors it takes, if there is one."""
        return None

    @property
    def epoch(self) -> int:
        """How often this rank has begun to agree with the others; stays 0 where kernels do all that
        others wait for, whatever happens to the host."""
        return 0

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether `close` was called."""

    @property
    @abstractmethod
    def plans_two_levels(self) -> bool:
        """Whether its plans have a node level."""

    @abstractmethod
    def agree_on_error(self, call: Call) -> None:
        """Publish `call`, whose error is set, so that every rank raises it. Always raises."""

    @abstractmethod
    def dispatch(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        weights: Tensor | None,
        routing: Tensor | Plan,
    ) -> Delivery:
        """Bring every row to the final expert-major slots of its experts.

        Args:
            call: what to agree on.
            rows: tensors `[T, ...]`.
            weights: float32 `[T, K]`; None: every pair has weight 1.
            routing: int64 `[T, K]` expert ids, -1 for none; or the plan to reuse.
        """

    @abstractmethod
    def combine(
        self,
        call: Call,
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
        row_values: Tensor | None = None,
    ) -> Returned:
        """Sum every token's rows at its source.

        The sum: weight times row, then add, in fp32 (fp64 for fp64), k ascending, gives a rank's
        partial, rounded to the dtype; a node's partials are summed in rank order and rounded; the
        source sums the nodes in order and rounds.

        Args:
            call: what to agree on.
            rows: floating tensors `[R, ...]`, expert-major.
            row_weights: float32 `[R]`; None: a plain sum.
            plan: of the dispatch.
            row_values: float32 `[R]`, values that return to their pairs unsummed.
        """

    def combine_backward(
        self,
        call: Call,
        grads: tuple[Tensor, ...],
        rows: tuple[Tensor, ...],
        row_weights: Tensor | None,
        plan: Plan,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Bring the gradient of every sum to the rows that were summed, and weigh it there.

        Args:
            call: what to agree on.
            grads: tensors `[T, ...]`, the gradients of the sums.
            rows: what was combined, tensors `[R, ...]`.
            row_weights: float32 `[R]`; None: the sum was plain.
            plan: of the dispatch.

        Returns:
            gradients of `rows`, and of the weights, float32 `[R]`; see `weigh_gradients`.
        """
        got = self.dispatch(call, grads, None, plan)
        return weigh_gradients(got.rows, rows, row_weights)

    def empty_like(self, rows: Tensor) -> Tensor:
        """Uninitialised rows where `combine` reads them best; not collective."""
        return torch.empty_like(rows)

    @abstractmethod
    def exchange(
        self,
        call: Call,
        source: Tensor,
        send: Sequence[Segments],
        out: Tensor,
        receive: Sequence[Segments],
    ) -> None:
        """Move segments of `source` into segments of `out` (both uint8 `[bytes]`), one to one."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when all that was asked for is done; raise what was found meanwhile."""

    def check_beside(self) -> None:
        """Make ready for `run_beside`.

        Raises:
            InputError: the engine has no streams, or its kernels would not fit beside others;
                raised on this rank.
        """
        raise input_error(
            "async_op",
            "engine",
            got=repr(self.name),
            expected="'cuda'",
            remedy="call dispatch and combine, which return when they are done",
        )

    def run_beside(
        self, operation: Callable[[], Result], inputs: Sequence[Tensor]
    ) -> tuple[Result, torch.cuda.Event]:
        """Run one of this engine's operations on a side stream, where `check_beside` raises none.

        Args:
            operation: calls it.
            inputs: the tensors it reads.

        Returns:
            its result, and the event after which other streams may use it.
        """
        raise AssertionError("check_beside raises where this cannot be")

    @abstractmethod
    def stats(self) -> Stats:
        """What it has done so far; not collective."""

    @abstractmethod
    def close(self, lost: int | None = None) -> None:
        """Release everything. Idempotent, not collective.

        Args:
            lost: the rank whose loss is the reason, so that others can be told.
        """

    def new_number(self) -> int:
        """The number of the plan that all ranks have just agreed to make."""
        self._num_plans += 1
        return self._num_plans - 1

    def new_identity(self) -> Tensor:
        """The identity of the plan that all ranks have just agreed to make."""
        # Several times as fast as torch.tensor.
        return torch.from_numpy(np.array((self.new_number(), self.world.key)))

    @property
    def _is_counted_on(self) -> bool:
        """Whether others may wait for what this rank does in the operation that goes on."""
        return not self.is_closed and self.epoch != self._epoch_before
