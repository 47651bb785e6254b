"""What the methods of a Shuffle check of their arguments, before any rank is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusco.engines.base import Engine
from fusco.errors import input_error
from fusco.layout.segments import bytes_per_row, describe_format
from fusco.plans import Plan
from fusco.types import Dispatched, Rows, as_tuple

SUMMABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUMMABLE_NAMES = "float16, bfloat16, float32 or float64"
_MOST_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a Shuffle was made for.

    Attributes:
        top_k: K.
        max_tokens: the most tokens a rank may dispatch.
        row_bytes: the most bytes a row may have, over all tensors of a tuple.
        row_unit_bytes: rows of each tensor must be a multiple of it.
        max_parts: the most tensors in a tuple; None: any number.
        device_types: kinds of device the engine works on.
        device: the only one of them, if it must be that; None: any of these kinds.
        key: the mark that the Shuffle's plans carry.
    """

    top_k: int
    max_tokens: int
    row_bytes: int
    row_unit_bytes: int
    max_parts: int | None
    device_types: tuple[str, ...]
    device: torch.device | None
    key: int

    @classmethod
    def of(cls, engine: Engine) -> Limits:
        """What the engine of a Shuffle was made for."""
        world = engine.world
        return cls(
            top_k=world.top_k,
            max_tokens=world.max_tokens,
            row_bytes=world.row_bytes,
            row_unit_bytes=engine.row_unit_bytes,
            max_parts=engine.max_parts,
            device_types=engine.device_types,
            device=engine.device,
            key=world.key,
        )

    def check_dispatch(
        self,
        x: Rows,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        plan: Plan | None,
    ) -> None:
        """Raise an InputError for the first argument that is wrong."""
        rows = self._check_rows("dispatch", "x", x)
        num_tokens, device = rows[0].shape[0], rows[0].device
        if num_tokens > self.max_tokens:
            raise input_error(
                "dispatch",
                "x",
                got=f"{num_tokens} tokens",
                expected=f"at most max_tokens={self.max_tokens}",
                remedy="dispatch in parts, or make the Shuffle with a larger max_tokens",
            )
        for each in rows:
            if _wants_no_sum(each):
                raise input_error(
                    "dispatch",
                    "x",
                    got=f"{each.dtype} that requires a gradient",
                    expected=f"{_SUMMABLE_NAMES}, or no gradient",
                    remedy="gradients are summed, so pass x.detach(), or of complex rows "
                    "torch.view_as_real(x)",
                )
        if plan is None:
            self._check_topk_idx(topk_idx, num_tokens, device)
        else:
            self._check_plan("dispatch", plan)
            if topk_idx is not None:
                raise input_error(
                    "dispatch",
                    "topk_idx",
                    got="a tensor beside plan=",
                    expected="one of the two",
                    remedy="a plan already holds its routing",
                )
            if num_tokens != plan.num_tokens:
                raise input_error(
                    "dispatch",
                    "x",
                    got=f"{num_tokens} tokens",
                    expected=f"the {plan.num_tokens} tokens of the plan",
                    remedy="a plan serves the routing it was made from; dispatch with topk_idx",
                )
        if topk_weights is not None:
            self._check_weights(topk_weights, num_tokens, device)

    def check_combine(
        self, expert_outputs: Rows, dispatched: Dispatched[Any], *, weighted: bool
    ) -> None:
        """Raise an InputError for the first argument that is wrong."""
        if not isinstance(dispatched, Dispatched):
            raise input_error(
                "combine",
                "dispatched",
                got=type(dispatched).__name__,
                expected="what dispatch returned",
                remedy="call combine(expert_outputs, d) with d = shuffle.dispatch(...)",
            )
        row_weights = dispatched.row_weights if weighted else None
        self.check_sums(expert_outputs, row_weights, dispatched.plan)

    def check_sums(self, expert_outputs: Rows, row_weights: Tensor | None, plan: Plan) -> None:
        """The same, for who has the parts of what dispatch returned."""
        self._check_plan("combine", plan)
        rows = self._check_rows("combine", "expert_outputs", expert_outputs)
        num_rows = plan.num_rows
        _check_device("combine", "expert_outputs", rows[0], plan.device)
        for each in rows:
            if each.dtype not in SUMMABLE:
                raise input_error(
                    "combine",
                    "expert_outputs",
                    got=str(each.dtype),
                    expected=_SUMMABLE_NAMES,
                    remedy="rows are summed, so convert them first",
                )
            if each.shape[0] != num_rows:
                raise input_error(
                    "combine",
                    "expert_outputs",
                    got=f"{each.shape[0]} rows",
                    expected=f"{num_rows}, one for each row of d.tokens, padding included",
                    remedy="keep the order and number of d.tokens",
                )
        if row_weights is None:
            return
        _check_device("combine", "row_weights", row_weights, plan.device)
        if not _is_dense_float32(row_weights, (num_rows,)):
            raise input_error(
                "combine",
                "row_weights",
                got=_describe(row_weights),
                expected=f"float32 of shape ({num_rows},)",
                remedy="use the row_weights that dispatch returned, or weighted=False",
            )

    def _check_rows(self, operation: str, argument: str, given: Rows) -> tuple[Tensor, ...]:
        several = isinstance(given, (tuple, list))
        if not (several and given and all(isinstance(each, Tensor) for each in given)) and (
            not isinstance(given, Tensor)
        ):
            raise input_error(
                operation,
                argument,
                got=_kinds(given) if several else type(given).__name__,
                expected="a tensor or a tuple of tensors",
                remedy="pass rows [num_tokens, ...]",
            )
        rows = as_tuple(given)
        if self.max_parts is not None and len(rows) > self.max_parts:
            raise input_error(
                operation,
                argument,
                got=f"{len(rows)} tensors",
                expected=f"at most {self.max_parts} with this engine",
                remedy="move them in several calls with plan=, or choose another engine",
            )
        for each in rows:
            self._check_one(operation, argument, each, rows[0])
        row_bytes = sum(bytes_per_row(each) for each in rows)
        if row_bytes > self.row_bytes:
            formats = ", ".join(describe_format(each.dtype, each.shape[1:]) for each in rows)
            remedy = "if their dtype is not the Shuffle's, convert them"
            if any(each.dim() > 2 for each in rows):
                remedy = f"if this is a batch of sequences, pass {argument}.flatten(0, 1)"
            raise input_error(
                operation,
                argument,
                got=f"rows of {row_bytes} bytes, {formats}",
                expected=f"at most {self.row_bytes} (hidden_size x dtype)",
                remedy=f"{remedy}, or make a Shuffle with a larger hidden_size or a wider dtype",
            )
        return rows

    def _check_one(self, operation: str, argument: str, each: Tensor, first: Tensor) -> None:
        if each.dim() == 0 or each.layout != torch.strided:
            raise input_error(
                operation,
                argument,
                got=f"a tensor of {each.dim()} dimensions, layout {each.layout}",
                expected="dense rows [num_tokens, ...]",
                remedy="the first dimension counts tokens",
            )
        if each.shape[0] != first.shape[0]:
            raise input_error(
                operation,
                argument,
                got=f"tensors of {first.shape[0]} and {each.shape[0]} rows",
                expected="the same number in all of a tuple",
                remedy="row i of every tensor belongs to token i",
            )
        if not bytes_per_row(each):
            raise input_error(
                operation,
                argument,
                got=f"rows of no bytes, shape {tuple(each.shape)}",
                expected="rows of at least one element",
                remedy="leave out what has no width",
            )
        if bytes_per_row(each) % self.row_unit_bytes:
            raise input_error(
                operation,
                argument,
                got=f"rows of {bytes_per_row(each)} bytes",
                expected=f"a multiple of {self.row_unit_bytes} bytes with this engine",
                remedy="pad the rows, or choose another engine",
            )
        kinds = self.device_types
        if each.device != first.device or each.device.type not in kinds:
            raise input_error(
                operation,
                argument,
                got=f"a tensor on {each.device}",
                expected=f"all on one {' or '.join(kinds)} device",
                remedy="move it, or choose another engine",
            )
        if self.device is not None and each.device != self.device:
            raise input_error(
                operation,
                argument,
                got=f"a tensor on {each.device}",
                expected=f"{self.device}, the current device when the Shuffle was made",
                remedy="call torch.cuda.set_device before making it",
            )

    def _check_topk_idx(
        self, topk_idx: Tensor | None, num_tokens: int, device: torch.device
    ) -> None:
        shape = (num_tokens, self.top_k)
        if not isinstance(topk_idx, Tensor):
            raise input_error(
                "dispatch",
                "topk_idx",
                got=type(topk_idx).__name__,
                expected=f"an int64 tensor of shape {shape}",
                remedy="pass the expert ids of each token, or plan=",
            )
        is_integer = topk_idx.dtype in (torch.int64, torch.int32)
        if topk_idx.shape != shape or not is_integer or topk_idx.layout != torch.strided:
            raise input_error(
                "dispatch",
                "topk_idx",
                got=_describe(topk_idx),
                expected=f"int64 or int32 of shape {shape}",
                remedy="one row a token of x, one column each of top_k; -1 for no expert",
            )
        _check_device("dispatch", "topk_idx", topk_idx, device)

    def _check_weights(self, topk_weights: Tensor, num_tokens: int, device: torch.device) -> None:
        shape = (num_tokens, self.top_k)
        if not isinstance(topk_weights, Tensor):
            raise input_error(
                "dispatch",
                "topk_weights",
                got=type(topk_weights).__name__,
                expected=f"a float32 tensor of shape {shape}, or None",
                remedy="pass one weight for each expert id",
            )
        if not _is_dense_float32(topk_weights, shape):
            raise input_error(
                "dispatch",
                "topk_weights",
                got=_describe(topk_weights),
                expected=f"float32 of shape {shape}",
                remedy="pass topk_weights.float(), one weight for each expert id",
            )
        _check_device("dispatch", "topk_weights", topk_weights, device)

    def _check_plan(self, operation: str, plan: Plan) -> None:
        if not isinstance(plan, Plan):
            raise input_error(
                operation,
                "plan",
                got=type(plan).__name__,
                expected="the plan of an earlier dispatch, d.plan",
                remedy="dispatch with topk_idx to make one",
            )
        if plan.key != self.key:
            raise input_error(
                operation,
                "plan",
                got="a plan of another Shuffle",
                expected="one that this Shuffle made",
                remedy="pass what came from this Shuffle, or dispatch with topk_idx here first",
            )


def is_dispatch(x: Any, topk_idx: Any, topk_weights: Any, plan: Any) -> bool:
    """Whether these are of the types that a dispatch takes, whatever their values."""
    if plan is None:
        is_routed = isinstance(topk_idx, Tensor)
    else:
        is_routed = isinstance(plan, Plan) and topk_idx is None
    if not (is_routed and isinstance(topk_weights, (Tensor, type(None))) and _are_rows(x)):
        return False
    # Of such rows no compiler makes a backward.
    for each in as_tuple(x):  # noqa: SIM110
        if _wants_no_sum(each):
            return False
    return True


def is_combine(expert_outputs: Any, dispatched: Any) -> bool:
    """The same for a combine."""
    return isinstance(dispatched, Dispatched) and _are_rows(expert_outputs)


def _are_rows(given: Any) -> bool:
    rows = given if isinstance(given, (tuple, list)) else (given,)
    # As one expression, the compiler of torch 2.11 does not take it.
    for each in rows:
        if not isinstance(each, Tensor) or each.dim() == 0:
            return False
    return len(rows) > 0


def _wants_no_sum(rows: Tensor) -> bool:
    """Whether rows ask for a gradient of a dtype that cannot be summed."""
    return rows.dtype not in SUMMABLE and rows.requires_grad and torch.is_grad_enabled()


def check_like(rows: Tensor) -> None:
    """Raise an InputError unless `Shuffle.empty_like` can make rows like these."""
    got = type(rows).__name__
    if isinstance(rows, Tensor):
        if rows.dim():
            return
        got = "a tensor of no dimensions"
    raise input_error(
        "empty_like",
        "rows",
        got=got,
        expected="a tensor of rows [num_rows, ...]",
        remedy="pass d.tokens, or one tensor of its tuple",
    )


def _check_device(operation: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise input_error(
            operation,
            argument,
            got=f"a tensor on {tensor.device}",
            expected=f"{device}, where x is",
            remedy="move it there",
        )


def _is_dense_float32(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    is_dense = tensor.layout == torch.strided
    return is_dense and tensor.dtype == torch.float32 and tensor.shape == shape


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f", layout {tensor.layout}"
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}{layout}"


def _kinds(rows: Sequence[object]) -> str:
    names = [type(each).__name__ for each in rows]
    if len(names) > _MOST_NAMED:
        return f"{len(names)} of {', '.join(sorted(set(names)))}"
    return ", ".join(names) or "an empty tuple"
