"""What a Shuffle is made of, and whether that makes sense."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch

from fusco.errors import input_error
from fusco.topology import contiguous_placement
from fusco.types import Ablation


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The arguments of `Shuffle` that must be equal on all ranks; see there.

    Any integers become Python's own, since ranks compare them as JSON, which knows no others.
    """

    num_experts: int
    hidden_size: int
    top_k: int
    max_tokens: int
    dtype: str
    ranks_per_node: int | None
    placement: tuple[int, ...] | None
    expert_alignment: int
    max_recv_tokens: int | None = None
    num_sms: int | None = None
    ablation: Ablation = field(default_factory=Ablation)

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *_OPTIONAL_COUNTS):
            object.__setattr__(self, name, as_integer(getattr(self, name)))

    def check(self, num_ranks: int, dtype: object, operation: str = "Shuffle") -> None:
        """Raise an InputError for what is wrong in itself; `operation` is who was given it."""
        if not isinstance(dtype, torch.dtype):
            raise input_error(
                operation,
                "dtype",
                got=repr(dtype),
                expected="a torch.dtype",
                remedy="pass for example torch.bfloat16",
            )
        given = self.ablation
        if not isinstance(given, Ablation) or not all(
            type(v) is bool for v in vars(given).values()
        ):
            raise input_error(
                operation,
                "ablation",
                got=repr(given),
                expected="a fusco.Ablation of True and False, or None",
                remedy="pass for example fusco.Ablation(fusion=False)",
            )
        for name in _COUNTS:
            _check_count(operation, name, getattr(self, name))
        for name in _OPTIONAL_COUNTS:
            if getattr(self, name) is not None:
                _check_count(operation, name, getattr(self, name))
        if self.placement is None:
            if self.num_experts % num_ranks:
                raise input_error(
                    operation,
                    "num_experts",
                    got=str(self.num_experts),
                    expected=f"a multiple of the {num_ranks} ranks",
                    remedy="a Shuffle takes others with placement=, the rank of each expert",
                )
            return
        if not isinstance(self.placement, tuple) or len(self.placement) != self.num_experts:
            is_list = isinstance(self.placement, tuple)
            raise input_error(
                operation,
                "placement",
                got=f"{len(self.placement)} entries" if is_list else type(self.placement).__name__,
                expected=f"a list of {self.num_experts} ranks, one an expert",
                remedy="pass the rank of every expert",
            )
        for rank in self.placement:
            if _is_integer(rank) and 0 <= rank < num_ranks:
                continue
            raise input_error(
                operation,
                "placement",
                got=f"rank {rank!r}",
                expected=f"ranks of the group, 0 to {num_ranks - 1}",
                remedy="ranks are counted in the group, not in the job",
            )

    def rank_of_expert(self, num_ranks: int) -> tuple[int, ...]:
        """The placement, given or implied."""
        return self.placement or contiguous_placement(self.num_experts, num_ranks)


_COUNTS = ("num_experts", "hidden_size", "top_k", "max_tokens", "expert_alignment")
_OPTIONAL_COUNTS = ("ranks_per_node", "max_recv_tokens", "num_sms")


def as_placement(given: Any) -> Any:
    """A list, array or tensor of ranks as a tuple of integers; what is none of these stays."""
    if hasattr(given, "tolist"):
        with suppress(RuntimeError):  # of tensors without values
            given = given.tolist()
    return tuple(map(as_integer, given)) if isinstance(given, Sequence) else given


def as_integer(value: Any) -> Any:
    """Any integer, such as numpy's, as an `int`; what is none stays."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        return value


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(operation: str, name: str, value: object) -> None:
    if not _is_integer(value) or value < 1:
        raise input_error(
            operation,
            name,
            got=repr(value),
            expected="an integer above 0",
            remedy="pass a positive number",
        )
