"""What callers pass and get beside plans, all frozen.

Shape letters: L experts of this rank, R rows this rank receives (padding counted), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from torch import Tensor

from fusco.plans import Plan

Rows = Tensor | tuple[Tensor, ...]
AnyRows = TypeVar("AnyRows", bound=Rows)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Each mechanism of the paper's Table 3 (FUSCO, section 5.4), to be switched off alone.

    Attributes:
        fusion: the layout change happens inside the transfer. Off: rows are permuted into
            device-major order, moved, and permuted again.
        deduplicate: a token crosses to a node, and to a rank, once. Off: once for each of its
            experts, and combine then rounds every weighted row on its own.
        balance: forwarders are chosen by load (Algorithm 1). Off: by position in the node.
    """

    fusion: bool = True
    deduplicate: bool = True
    balance: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """Segment descriptors for one peer (FUSCO, section 3.2): parts of a byte buffer, in order.

    Attributes:
        offset: int64 `[n]` on the CPU, where each segment begins, bytes.
        size: int64 `[n]` on the CPU, bytes.
    """

    offset: Tensor
    size: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched(Generic[AnyRows]):
    """What `Shuffle.dispatch` returns.

    Attributes:
        tokens: `[R, H]` expert-major, this rank's experts; a tuple where a tuple was dispatched.
        row_weights: float32 `[R]`, the router weight of each row; 1 where no weights were given,
            0 on padding.
        plan: reusable: `shuffle.dispatch(x2, topk_weights=w2, plan=d.plan)`.
    """

    tokens: AnyRows
    row_weights: Tensor
    plan: Plan

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64 `[L]`, padding not counted. Part of the plan's memory, as are the offsets."""
        return self.plan.tokens_per_expert

    @property
    def expert_offsets(self) -> Tensor:
        """int32 `[L + 1]`, padding counted: local expert e has the rows from `[e]` to `[e + 1]`.
        Grouped products of torch take the ends alone (`offs=d.expert_offsets[1:]`)."""
        return self.plan.expert_offsets


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a Shuffle has done so far, as this rank saw it.

    Attributes:
        num_dispatches: dispatches, backwards of combine counted.
        num_combines: combines, backwards of dispatch counted.
        num_rows: rows received by dispatches, padding not counted.
        bytes_to_peer: row bytes moved to each rank of the group; the own rank's are local.
        load_imbalance: rows of the busiest rank over the mean, in the last plan.
        wait_s: seconds spent waiting for each rank.
        window_bytes: size of this rank's window now.
    """

    num_dispatches: int
    num_combines: int
    num_rows: int
    bytes_to_peer: tuple[int, ...]
    load_imbalance: float
    wait_s: tuple[float, ...]
    window_bytes: int


def as_tuple(rows: Rows) -> tuple[Tensor, ...]:
    """The tensors of a dispatch, one or several."""
    return (rows,) if isinstance(rows, Tensor) else tuple(rows)


def like(rows: AnyRows, tensors: Sequence[Tensor]) -> AnyRows:
    """One tensor where `rows` is one, else a tuple."""
    return cast(AnyRows, tensors[0] if isinstance(rows, Tensor) else tuple(tensors))
