"""The public face: `Shuffle`. Read this first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusco import ops
from fusco.checks import Limits
from fusco.configuration import Configuration
from fusco.engines import make_engine
from fusco.engines.agreement import Call
from fusco.engines.base import Engine, World
from fusco.errors import ClosedError, InputError
from fusco.groups import resolve_group
from fusco.layout.records import Operation
from fusco.meeting import meet
from fusco.profiling import stage
from fusco.topology import Topology
from fusco.types import Ablation, AnyRows, Dispatched, Plan, Stats, as_tuple, like

_KEYS = itertools.count()


class Shuffle:
    """Moves tokens to the ranks of their experts and back.

        shuffle = fusco.Shuffle(num_experts=64, hidden_size=2048, top_k=8, max_tokens=1024)
        d = shuffle.dispatch(x, topk_idx, topk_weights)
        y = shuffle.combine(experts(d.tokens, d.expert_offsets), d)

    Every method but `stats` and `close` is collective: all ranks of the group call it, in the
    same order. A context manager; several may live at once, also on subgroups.

    Args:
        num_experts: E, over all ranks.
        hidden_size: with `dtype`, the widest row to be moved; it sizes the windows.
        top_k: K, experts a token.
        max_tokens: the most tokens a rank dispatches at once.
        group: None (the default group), a ProcessGroup or a one-dimensional DeviceMesh.
        dtype: see `hidden_size`. Rows of any dtype may be moved whose bytes fit.
        engine: "cpu", "reference", or "auto": the fastest that can run.
        ranks_per_node: ranks that share a node, in blocks; None: found by host.
        placement: `[E]`, the rank of each expert; None: equal contiguous blocks. A rank's local
            experts are in ascending order of id.
        expert_alignment: every expert's rows are padded with zeros to a multiple of it.
        timeout_s: bound of every wait in seconds; None: the group's.
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
        placement: Sequence[int] | None = None,
        expert_alignment: int = 1,
        timeout_s: float | None = None,
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
            placement=tuple(placement) if isinstance(placement, Sequence) else placement,
            expert_alignment=expert_alignment,
            ablation=ablation or Ablation(),
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
            ranks_per_node=ranks_per_node,
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
            top_k=top_k,
            max_tokens=max_tokens,
            row_bytes=hidden_size * dtype.itemsize,
            alignment=expert_alignment,
            timeout_s=meeting.timeout_s,
            ablation=configuration.ablation,
        )
        self._engine: Engine = make_engine(meeting.engine, world)
        self._limits = Limits(
            top_k=top_k,
            max_tokens=max_tokens,
            row_bytes=world.row_bytes,
            row_unit_bytes=self._engine.row_unit_bytes,
            max_parts=self._engine.max_parts,
            device_types=self._engine.device_types,
            key=self._key,
        )
        ops.ENGINES[self._key] = self._engine

    @property
    def engine_name(self) -> str:
        """The engine in use."""
        return self._engine.name

    @property
    def topology(self) -> Topology:
        """Ranks, nodes and placement."""
        return self._engine.world.topology

    def dispatch(
        self,
        x: AnyRows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        plan: Plan | None = None,
    ) -> Dispatched[AnyRows]:
        """Bring every token to the ranks of its experts, in expert-major order.

        Args:
            x: `[T, H]`, or any tensor of rows `[T, ...]`, or a tuple of them. T may differ
                between ranks and may be 0; row formats may not.
            topk_idx: int64 or int32 `[T, K]`, expert ids; -1 for none. The same expert twice
                gives two rows.
            topk_weights: float32 `[T, K]`; None: combine is a plain sum.
            plan: of an earlier dispatch, instead of `topk_idx`.

        Returns:
            the rows of this rank's experts, sorted by local expert, source rank, token and k.

        Raises:
            InputError: an argument is wrong on some rank; raised on all.
            DisagreementError: the ranks' calls do not fit together; raised on all.
            PeerError: a rank died or did not come in time; the Shuffle is closed.
            ClosedError: the Shuffle was closed before.
        """
        self._require_open()
        operation = Operation.DISPATCH if plan is None else Operation.DISPATCH_PLANNED
        with stage("dispatch"):
            try:
                self._limits.check_dispatch(x, topk_idx, topk_weights, plan)
            except InputError as error:
                self._raise_everywhere(Call(operation=operation, error=error))
            rows = as_tuple(x)
            grads = ops.wanted_gradients(rows, topk_weights)
            if plan is not None:
                got, row_weights = ops.dispatch_planned(
                    list(rows), topk_weights, plan.to_tensors(), self._key, grads
                )
            else:
                assert topk_idx is not None, "checked above"
                got, row_weights, flat = ops.dispatch(
                    list(rows), topk_idx.to(torch.int64), topk_weights, self._key, grads
                )
                plan = Plan.from_tensors(flat)
        return Dispatched(
            tokens=like(x, got),
            tokens_per_expert=plan.tokens_per_expert,
            expert_offsets=plan.expert_offsets,
            row_weights=row_weights,
            plan=plan,
        )

    def combine(
        self, expert_outputs: AnyRows, dispatched: Dispatched[Any], *, weighted: bool = True
    ) -> AnyRows:
        """Bring expert outputs back and sum them: `y[t] = sum_k w[t, k] * row(t, k)`.

        The sum is taken in fp32 (fp64 for fp64), in one order on every engine: multiply, then
        add, k ascending, gives a rank's partial, rounded to the dtype; a node's partials are
        summed in rank order and rounded; the source sums the nodes in order and rounds.

        Args:
            expert_outputs: `[R, H]`, row by row what became of `d.tokens`; the dtype may differ
                from what was dispatched, but must be floating. Or a tuple of such tensors.
            dispatched: what `dispatch` returned.
            weighted: False: a plain sum.

        Returns:
            `[T, H]`, zeros for tokens without an expert.

        Raises:
            InputError, DisagreementError, PeerError, ClosedError: as in `dispatch`.
        """
        self._require_open()
        with stage("combine"):
            try:
                self._limits.check_combine(expert_outputs, dispatched, weighted=weighted)
            except InputError as error:
                self._raise_everywhere(Call(operation=Operation.COMBINE, error=error))
            rows = as_tuple(expert_outputs)
            row_weights = dispatched.row_weights if weighted else None
            anchor = next((t for t in as_tuple(dispatched.tokens) if t.requires_grad), None)
            # Which of the inputs carry a graph may differ between ranks, whether one does may not.
            inputs = [*rows, dispatched.row_weights, *([] if anchor is None else [anchor])]
            has_graph = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
            sums = ops.combine(
                [each.contiguous() for each in rows],
                row_weights,
                anchor,
                dispatched.plan.to_tensors(),
                self._key,
                "with gradients" if has_graph else "no gradients",
            )
        return like(expert_outputs, sums)

    def stats(self) -> Stats:
        """What this Shuffle has done so far; not collective."""
        self._require_open()
        return self._engine.stats()

    def close(self) -> None:
        """Release the windows. Idempotent, not collective."""
        engine = ops.ENGINES.pop(self._key, None)
        if engine is not None:
            engine.close()

    def __enter__(self) -> Shuffle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _raise_everywhere(self, call: Call) -> None:
        with ops.using(self._key) as engine:
            engine.agree_on_error(call)

    def _require_open(self) -> None:
        if self._key not in ops.ENGINES:
            raise ClosedError("Shuffle: it was closed, or a rank was lost; make a new one")
