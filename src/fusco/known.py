"""Checks of calls, made once for tensors that come again alike, since a small call takes less."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusco import calls
from fusco.checks import Limits
from fusco.engines.base import Engine
from fusco.layout.records import Operation
from fusco.plans import Plan
from fusco.types import Dispatched, Rows, as_tuple

_MAX_KNOWN = 1024


class KnownCalls:
    """Checks the calls of a Shuffle, and keeps what has been checked of plain tensors."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limits = Limits.of(engine)
        self._shuffle = engine.world.key
        # What has been checked, and what of it is the same on all ranks, in words.
        self._known: dict[tuple[Any, ...], tuple[str, ...]] = {}
        # Those that the engine's fast path has been told of, if it has one.
        self._told: set[tuple[Any, ...] | None] = set()

    def checked_dispatch(
        self, x: Rows, topk_idx: Tensor | None, topk_weights: Tensor | None, plan: Plan | None
    ) -> tuple[str, ...] | None:
        """Check. Of plain tensors: which gradients are wanted, and the form of the call."""
        key = _key_of(x, topk_idx, topk_weights) if plan is None else None
        known = None if key is None else self._known.get(key)
        if known is None:
            # No lambda: its variables would cost calls that are known as well.
            calls.check(
                self._engine,
                Operation.DISPATCH if plan is None else Operation.DISPATCH_PLANNED,
                partial(self._limits.check_dispatch, x, topk_idx, topk_weights, plan),
            )
            if key is not None:
                rows = as_tuple(x)
                grads = calls.wanted_gradients(rows, topk_weights)
                known = self._know(key, (grads, calls.form_of(rows, topk_weights, grads)))
        elif key not in self._told:
            self._tell_dispatch(key, known, x, topk_idx, topk_weights)
        return known

    def checked_combine(
        self, expert_outputs: Rows, dispatched: Dispatched[Any], weighted: bool
    ) -> tuple[str, ...] | None:
        """Check. Of plain tensors: the form of the call without gradients, and with them."""
        key = _key_of_outputs(expert_outputs, dispatched, weighted, self._shuffle)
        known = None if key is None else self._known.get(key)
        if known is None:
            calls.check(
                self._engine,
                Operation.COMBINE,
                partial(self._limits.check_combine, expert_outputs, dispatched, weighted=weighted),
            )
            if key is not None:
                rows = as_tuple(expert_outputs)
                weights = dispatched.row_weights if weighted else None
                both = calls.NO_GRADIENTS, calls.WITH_GRADIENTS
                known = self._know(
                    key, tuple([calls.form_of(rows, weights, each) for each in both])
                )
        elif weighted and key not in self._told:
            self._tell_combine(key, known, expert_outputs)
        return known

    def _tell_dispatch(
        self, key: Any, known: tuple[str, ...], x: Any, topk_idx: Any, weights: Any
    ) -> None:
        """Tell the fast path of calls that have been served and come again."""
        self._told.add(key)
        if self._engine.fast_path is not None:
            grads, form = known
            in_graph = grads != calls.NO_GRADIENTS
            self._engine.fast_path.know_dispatch(form, x, topk_idx, weights, in_graph=in_graph)

    def _tell_combine(self, key: Any, known: tuple[str, ...], outputs: Any) -> None:
        """Likewise of combines."""
        self._told.add(key)
        if self._engine.fast_path is not None:
            for in_graph, form in enumerate(known):
                self._engine.fast_path.know_combine(form, outputs, in_graph=bool(in_graph))

    def _know(self, key: tuple[Any, ...], known: tuple[str, ...]) -> tuple[str, ...]:
        if len(self._known) < _MAX_KNOWN:
            self._known[key] = known
        return known


def _key_of(x: Any, topk_idx: Any, topk_weights: Any) -> tuple[Any, ...] | None:
    """All that is checked of plain tensors, for those who come again; None where it is more."""
    if type(x) is not Tensor or type(topk_idx) is not Tensor or type(topk_weights) is not Tensor:
        return None
    ids, weights, has_grad = topk_idx, topk_weights, torch.is_grad_enabled()
    return (
        *(x.shape, x.dtype, x.device, x.layout, has_grad and x.requires_grad),
        *(ids.shape, ids.dtype, ids.device, ids.layout),
        *(weights.shape, weights.dtype, weights.device, weights.layout),
        has_grad and weights.requires_grad,
    )


def _key_of_outputs(
    outputs: Any, dispatched: Any, weighted: bool, shuffle: int
) -> tuple[Any, ...] | None:
    """The same for a combine, where a plan of this Shuffle has as many rows."""
    if type(outputs) is not Tensor or type(dispatched) is not Dispatched:
        return None
    if type(weighted) is not bool:
        return None
    plan, weights = dispatched.plan, dispatched.row_weights
    if not isinstance(plan, Plan) or plan.key != shuffle:
        return None
    if type(weights) is not Tensor or weights.dtype != torch.float32:
        return None
    num_rows, shape = (plan.num_rows,), outputs.shape
    if shape[:1] != num_rows or weights.shape != num_rows:
        return None
    return (
        *(shape[1:], outputs.dtype, outputs.device, outputs.layout),
        *(plan.device, weights.device, weights.layout, weighted),
    )
