"""The public face: `Shuffle`. Read this first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal, cast, overload

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusco import calls, eager, fakes, ops  # noqa: F401 - fakes are for tracers
from fusco.checks import check_like, is_combine, is_dispatch
from fusco.configuration import Configuration, as_placement
from fusco.engines import make_engine
from fusco.engines.base import ENGINES, Engine, World
from fusco.errors import EngineUnavailableError, InputError, closed_error
from fusco.groups import resolve_group
from fusco.known import KnownCalls
from fusco.layout.records import Operation
from fusco.meeting import meet
from fusco.plans import Plan
from fusco.profiling import stage
from fusco.topology import Topology
from fusco.types import Ablation, AnyRows, Dispatched, Stats, as_tuple, like

_KEYS = itertools.count()


class Shuffle:
    """Moves tokens to the ranks of their experts and back.

        shuffle = fusco.Shuffle(num_experts=64, hidden_size=2048, top_k=8, max_tokens=1024)
        d = shuffle.dispatch(x, topk_idx, topk_weights)
        y = shuffle.combine(experts(d.tokens, d.expert_offsets), d)

    Every method but `empty_like`, `stats` and `close` is collective: all ranks of the group call
    it, in the same order. A context manager, to be left after the last backward; several may live
    at once, also on subgroups.

    Args:
        num_experts: E, over all ranks.
        hidden_size: with `dtype`, the widest row to be moved, of a tuple all tensors together; it
            sizes the windows.
        top_k: K, experts a token.
        max_tokens: the most tokens a rank dispatches at once.
        group: None (the default group), a ProcessGroup or a one-dimensional DeviceMesh.
        dtype: see `hidden_size`. Rows of any dtype may be moved whose bytes fit.
        engine: "cuda", "cpu", "two_level", "reference", or "auto": the fastest that can run.
        ranks_per_node: ranks that share a node, in blocks, of which the last may be smaller; None:
            found by host.
        placement: `[E]`, the rank of each expert, a list, array or tensor; None: equal contiguous
            blocks. A rank's local experts are in ascending order of id.
        expert_alignment: every expert's rows are padded with zeros to a multiple of it.
        timeout_s: bound of every wait in seconds; None: the group's. Ranks that make their part of
            an engine, and may compile kernels, are waited for at least 180.
        max_recv_tokens: room for so many rows on every rank, always: dispatch returns outputs of
            that size without waiting for the GPU, and can be captured in a CUDA graph. Rows behind
            the last are not written, nor are their gradients. If a rank would receive more, every
            expert receives nothing (`expert_offsets` and `tokens_per_expert` are 0, the rows are
            not written), sums are 0, and `synchronize` raises on every rank. Captured outputs
            belong to the memory pool of their graph, as tensors of torch do: graphs that share one
            (`pool=`) use the same memory, others never. It stays the pool's until the Shuffle is
            closed, so share one to capture again and again. Replays are ordered by their streams
            alone: a stream on which others follow must wait for theirs. None: outputs have as many
            rows as arrive. "cuda" only.
        num_sms: the most multiprocessors of a GPU that an operation takes; None: all. Shuffles
            that are called with `async_op` must fit on the GPU together, which is checked; the
            operations of others wait for each other. Other engines than "cuda" do not look at it.
        ablation: mechanisms to switch off, for measurements.

    Raises:
        InputError: an argument is wrong on some rank; raised on all.
        DisagreementError: the ranks' arguments differ; raised on all.
        EngineUnavailableError: the engine cannot run here.
        PeerError: a rank did not come in time.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        top_k: int,
        max_tokens: int,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        dtype: torch.dtype = torch.bfloat16,
        engine: str = "auto",
        ranks_per_node: int | None = None,
        placement: Sequence[int] | Tensor | npt.NDArray[Any] | None = None,
        expert_alignment: int = 1,
        timeout_s: float | None = None,
        max_recv_tokens: int | None = None,
        num_sms: int | None = None,
        ablation: Ablation | None = None,
    ) -> None:
        self._key = next(_KEYS)
        process_group = resolve_group("Shuffle", group)
        configuration = Configuration(
            num_experts=num_experts,
            hidden_size=hidden_size,
            top_k=top_k,
            max_tokens=max_tokens,
            dtype=str(dtype),
            ranks_per_node=ranks_per_node,
            placement=as_placement(placement),
            expert_alignment=expert_alignment,
            max_recv_tokens=max_recv_tokens,
            num_sms=num_sms,
            ablation=Ablation() if ablation is None else ablation,
        )
        error = None
        try:
            configuration.check(process_group.size(), dtype)
        except InputError as problem:
            error = problem
        meeting = meet(
            "Shuffle",
            process_group,
            asdict(configuration) if error is None else {},
            error=error,
            engine=engine,
            ranks_per_node=configuration.ranks_per_node,
            timeout_s=timeout_s,
        )
        topology = Topology(
            rank=process_group.rank(),
            node_of_rank=meeting.node_of_rank,
            rank_of_expert=configuration.rank_of_expert(process_group.size()),
        )
        world = World(
            group=process_group,
            topology=topology,
            key=self._key,
            top_k=configuration.top_k,
            max_tokens=configuration.max_tokens,
            row_bytes=configuration.hidden_size * dtype.itemsize,
            max_recv_tokens=configuration.max_recv_tokens,
            num_sms=configuration.num_sms,
            alignment=configuration.expert_alignment,
            timeout_s=meeting.timeout_s,
            ablation=configuration.ablation,
            channel=meeting.channel,
        )
        if max_recv_tokens is not None and meeting.engine != "cuda":
            raise EngineUnavailableError(
                f"Shuffle: engine {meeting.engine!r} has no outputs of fixed size; leave out "
                "max_recv_tokens, or use engine='cuda'"
            )
        # What it keeps is used in every mode.
        with torch.inference_mode(False):
            self._engine: Engine = make_engine(meeting.engine, world)
        self._calls = KnownCalls(self._engine)
        ENGINES[self._key] = self._engine

    @property
    def engine_name(self) -> str:
        """The engine in use."""
        return self._engine.name

    @property
    def topology(self) -> Topology:
        """Ranks, nodes and placement."""
        return self._engine.world.topology

    @overload
    def dispatch(
        self,
        x: AnyRows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        plan: Plan | None = None,
        async_op: Literal[False] = False,
    ) -> Dispatched[AnyRows]: ...

    @overload
    def dispatch(
        self,
        x: AnyRows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        plan: Plan | None = None,
        async_op: Literal[True],
    ) -> tuple[Dispatched[AnyRows], torch.cuda.Event]: ...

    def dispatch(
        self,
        x: AnyRows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        plan: Plan | None = None,
        async_op: bool = False,
    ) -> Dispatched[AnyRows] | tuple[Dispatched[AnyRows], torch.cuda.Event]:
        """Bring every token to the ranks of its experts, in expert-major order.

        Args:
            x: `[T, H]`, or any tensor of rows `[T, ...]`, or a tuple of them. T may differ
                between ranks and may be 0; row formats may not.
            topk_idx: int64 or int32 `[T, K]`, expert ids; -1 for none. The same expert twice
                gives two rows.
            topk_weights: float32 `[T, K]`; None: combine is a plain sum.
            plan: of an earlier dispatch, instead of `topk_idx`. It holds no weights: without
                `topk_weights` combine is a plain sum.
            async_op: run on a side stream, beside what the current stream does next. Needs the
                engine "cuda", `num_sms`, and room on the GPU for all Shuffles that use it.

        Returns:
            the rows of this rank's experts, sorted by local expert, source rank, token and k, their
            weights, counts and offsets, and the plan (`fusco.Dispatched`); with
            `async_op` also the event that a stream must wait for before it uses them
            (`event.wait()`).
            On GPUs they lie in memory of the Shuffle, of which `Tensor.record_stream` does not
            know: the stream that is current when they are dropped must wait for others that use
            them (`torch.cuda.current_stream().wait_stream(other)`).

        Raises:
            InputError: an argument is wrong on some rank; raised on all.
            DisagreementError: the ranks' calls do not fit together; raised on all.
            PeerError: a rank died or did not come in time; the Shuffle is closed.
            ClosedError: the Shuffle was closed before.
        """
        if not async_op:
            return self._dispatch(x, topk_idx, topk_weights, plan)
        tensors = _tensors_in(x, topk_idx, topk_weights, plan)
        return calls.run_beside(
            self._engine,
            Operation.DISPATCH if plan is None else Operation.DISPATCH_PLANNED,
            lambda: self._dispatch(x, topk_idx, topk_weights, plan),
            tensors,
        )

    def _dispatch(
        self,
        x: AnyRows,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        plan: Plan | None,
    ) -> Dispatched[AnyRows]:
        is_traced = torch.compiler.is_compiling()
        if not is_traced and plan is None and (path := self._engine.fast_path) is not None:
            served = path.dispatch(x, topk_idx, topk_weights)
            if served is not None:
                return cast("Dispatched[AnyRows]", served)
        self._require_open()
        got: Sequence[Tensor]
        known: tuple[str, ...] | None = None
        with stage("dispatch"):
            # A compiler knows no values and cannot tell other ranks: operators check their own.
            if not (is_traced and is_dispatch(x, topk_idx, topk_weights, plan)):
                known = self._calls.checked_dispatch(x, topk_idx, topk_weights, plan)
            rows = as_tuple(x)
            grads = known[0] if known else calls.wanted_gradients(rows, topk_weights)
            if not is_traced and calls.is_eager((*rows, topk_idx, topk_weights)):
                # The operators' own work takes longer than that of a small dispatch.
                form = known[1] if known else calls.form_of(rows, topk_weights, grads)
                run = calls.run_dispatch if grads == calls.NO_GRADIENTS else eager.dispatch
                routing = _wide(topk_idx) if plan is None else plan
                got, row_weights, plan = run(rows, routing, topk_weights, self._engine, form)
            elif plan is not None:
                got, row_weights = ops.dispatch_planned(
                    list(rows), topk_weights, plan.to_tensors(), self._key, grads
                )
            else:
                got, row_weights, flat = ops.dispatch(
                    list(rows), _wide(topk_idx), topk_weights, self._key, grads
                )
                plan = Plan.from_tensors(flat)
        return Dispatched(tokens=like(x, got), row_weights=row_weights, plan=plan)

    @overload
    def combine(
        self,
        expert_outputs: AnyRows,
        dispatched: Dispatched[Any],
        *,
        weighted: bool = True,
        async_op: Literal[False] = False,
    ) -> AnyRows: ...

    @overload
    def combine(
        self,
        expert_outputs: AnyRows,
        dispatched: Dispatched[Any],
        *,
        weighted: bool = True,
        async_op: Literal[True],
    ) -> tuple[AnyRows, torch.cuda.Event]: ...

    def combine(
        self,
        expert_outputs: AnyRows,
        dispatched: Dispatched[Any],
        *,
        weighted: bool = True,
        async_op: bool = False,
    ) -> AnyRows | tuple[AnyRows, torch.cuda.Event]:
        """Bring expert outputs back and sum them: `y[t] = sum_k w[t, k] * row(t, k)`.

        The sum is taken in fp32 (fp64 for fp64), in one order on every engine: multiply, then
        add, k ascending, gives a rank's partial, rounded to the dtype; a node's partials are
        summed in rank order and rounded; the source sums the nodes in order and rounds.

        Args:
            expert_outputs: `[R, H]`, row by row what became of `d.tokens`; the dtype may differ
                from what was dispatched, but must be floating. Or a tuple of such tensors.
            dispatched: what `dispatch` returned.
            weighted: False: a plain sum.
            async_op: as in `dispatch`.

        Returns:
            `[T, H]`, zeros for tokens without an expert; with `async_op` also the event.

        Raises:
            InputError, DisagreementError, PeerError, ClosedError: as in `dispatch`.
        """
        if not async_op:
            return self._combine(expert_outputs, dispatched, weighted)
        tensors = _tensors_in(expert_outputs, dispatched)
        return calls.run_beside(
            self._engine,
            Operation.COMBINE,
            lambda: self._combine(expert_outputs, dispatched, weighted),
            tensors,
        )

    def _combine(
        self, expert_outputs: AnyRows, dispatched: Dispatched[Any], weighted: bool
    ) -> AnyRows:
        is_traced = torch.compiler.is_compiling()
        if not is_traced and weighted is True and (path := self._engine.fast_path) is not None:
            summed = path.combine(expert_outputs, dispatched)
            if summed is not None:
                return cast("AnyRows", summed)
        self._require_open()
        known: tuple[str, ...] | None = None
        with stage("combine"):
            if not (is_traced and is_combine(expert_outputs, dispatched)):
                known = self._calls.checked_combine(expert_outputs, dispatched, weighted)
            rows = as_tuple(expert_outputs)
            row_weights = dispatched.row_weights if weighted else None
            anchor, has_graph = None, False
            if torch.is_grad_enabled():
                # Which of the inputs carry a graph may differ between ranks, whether one does may
                # not.
                anchor = _first_with_graph(as_tuple(dispatched.tokens))
                inputs = (anchor, *rows, dispatched.row_weights)
                has_graph = _first_with_graph(inputs) is not None
            sums: Sequence[Tensor]
            plan = dispatched.plan
            grads = calls.WITH_GRADIENTS if has_graph else calls.NO_GRADIENTS
            if is_traced or not calls.is_eager((*rows, row_weights, anchor)):
                sums = ops.combine(
                    list(rows), row_weights, anchor, plan.to_tensors(), self._key, grads
                )
            else:
                form = known[has_graph] if known else calls.form_of(rows, row_weights, grads)
                if has_graph:
                    sums = eager.combine(rows, row_weights, anchor, plan, self._engine, form)
                else:
                    sums = calls.run_combine(rows, row_weights, plan, self._engine, form).sums
        return like(expert_outputs, sums)

    def synchronize(self) -> None:
        """Return when all that this rank asked for is done, and raise what was found meanwhile.

        Only the engine "cuda" returns from `combine`, or with `max_recv_tokens` from `dispatch`,
        before it is known whether all ranks agree: the error is raised by the next dispatch, or
        here. With `max_recv_tokens` only this raises; until then no call does anything.
        """
        with self._engine as engine:
            engine.synchronize()

    def empty_like(self, rows: Tensor) -> Tensor:
        """An uninitialised tensor like `d.tokens`, to write the experts' outputs into.

        It lies where the engine's `combine` can read it best. With "cpu" that is memory of all
        ranks: each row is read once, by the rank that sums it, and copied nowhere. Do not write to
        it while a `combine` of it runs. torch writes into it (`out=`) only where no gradient is
        wanted, as under `torch.no_grad()`. Not collective.

        Raises:
            InputError: `rows` are no tensor of rows; raised on this rank.
            ClosedError: the Shuffle was closed before.
        """
        self._require_open()
        check_like(rows)
        return self._engine.empty_like(rows)

    def stats(self) -> Stats:
        """What this Shuffle has done so far; not collective. With "cuda" it warns where
        `synchronize` has something to raise, as does `close`."""
        self._require_open()
        return self._engine.stats()

    def close(self) -> None:
        """Release the windows; no backward runs afterwards. Idempotent, not collective."""
        ENGINES.pop(self._key, None)
        self._engine.close()

    def __enter__(self) -> Shuffle:
        self._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shuffle:
        """This Shuffle itself: a copy of a module that holds it, such as one of averaged weights,
        moves its tokens with the same one."""
        return self

    def _require_open(self) -> None:
        if self._engine.is_closed:
            raise closed_error()


def _first_with_graph(tensors: Iterable[Tensor | None]) -> Tensor | None:
    for each in tensors:
        if each is not None and each.requires_grad:
            return each
    return None


def _tensors_in(*given: object) -> list[Tensor]:
    """All tensors of arguments that nobody has checked yet."""
    found: list[Tensor] = []
    for each in given:
        if isinstance(each, Tensor) and each.layout == torch.strided:
            found.append(each)
        elif isinstance(each, Plan):
            found += each.to_tensors()
        elif isinstance(each, Dispatched):
            found += _tensors_in(each.row_weights, each.plan)
        elif isinstance(each, (tuple, list)):
            found += _tensors_in(*each)
    return found


def _wide(topk_idx: Tensor | None) -> Tensor:
    assert topk_idx is not None, "checked before"
    # Of other types the operators tell the user.
    return topk_idx.to(torch.int64) if topk_idx.dtype == torch.int32 else topk_idx
