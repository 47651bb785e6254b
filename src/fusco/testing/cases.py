"""Cases: one round trip's shape and routing, from which every rank draws the same inputs.

Since each rank can draw what all ranks hold, it computes the dense answer for itself, and a check
needs no communication but the library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import fusco
from fusco.groups import cuda_backend
from fusco.testing import dense
from fusco.types import Rows, as_tuple

Routing = Literal["uniform", "repeated", "holes", "one-expert", "nobody"]
_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One round trip of a group.

    Attributes:
        num_tokens: by rank.
        dtype: of the expert outputs, and of the rows where `payload` is "float".
        payload: rows of `dtype`, raw "bytes", or "scaled": fp8 rows with fp32 scales.
        routing: "uniform" draws distinct experts, "repeated" any, "holes" also -1, "one-expert"
            always the last expert, "nobody" only -1.
        weighted: whether the sum is weighted.
        device: the kind of device that the inputs are on; see `device_of`.
        placement, ranks_per_node, expert_alignment, num_experts: as `fusco.Shuffle` takes them.
    """

    num_tokens: tuple[int, ...]
    hidden_size: int = 64
    top_k: int = 2
    num_experts: int = 16
    dtype: torch.dtype = torch.float32
    payload: Literal["float", "bytes", "scaled"] = "float"
    routing: Routing = "uniform"
    weighted: bool = True
    placement: tuple[int, ...] | None = None
    ranks_per_node: int | None = None
    expert_alignment: int = 1
    seed: int = 0
    device: str = "cpu"

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return len(self.num_tokens)

    @property
    def _num_scales(self) -> int:
        return -(-self.hidden_size // 128) if self.payload == "scaled" else 0

    @property
    def node_of_rank(self) -> tuple[int, ...]:
        """The node of each rank."""
        if self.ranks_per_node is None and _told:
            return _told[: self.num_ranks]
        per_node = self.ranks_per_node or self.num_ranks
        return tuple(rank // per_node for rank in range(self.num_ranks))

    def shuffle(
        self, group: dist.ProcessGroup | None, engine: str, /, **changes: Any
    ) -> fusco.Shuffle:
        """A `fusco.Shuffle` of this case over `group`."""
        arguments: dict[str, Any] = {
            "num_experts": self.num_experts,
            # Scales may need more than narrower rows leave.
            "hidden_size": self.hidden_size + self._num_scales * _SCALE_BYTES,
            "top_k": self.top_k,
            "max_tokens": max(1, *self.num_tokens),
            "group": group,
            "dtype": self.dtype,
            "engine": engine,
            "ranks_per_node": self.ranks_per_node,
            "placement": self.placement,
            "expert_alignment": self.expert_alignment,
        }
        return fusco.Shuffle(**(arguments | changes))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What all ranks of a case hold, by rank; equal on every rank that draws it.

    Attributes:
        x: rows `[T, ...]`, or tuples of them.
        topk_idx: int64 `[T, K]`.
        topk_weights: fp32 `[T, K]`; None where the case is not weighted.
        layout: where every choice lands.
        outputs: expert outputs `[R, H]` of the case's dtype, different for every row.
        host: the same on the CPU, where the dense answers are computed.
    """

    case: Case
    x: tuple[Rows, ...]
    topk_idx: tuple[Tensor, ...]
    topk_weights: tuple[Tensor, ...] | None
    layout: dense.Layout = field(repr=False)
    outputs: tuple[Tensor, ...]
    host: Inputs | None = None

    def weights_of(self, rank: int) -> Tensor | None:
        """The weights `[T, K]` of `rank`; None where the case is not weighted."""
        return None if self.topk_weights is None else self.topk_weights[rank]

    def routed_as(self, other: Inputs) -> Inputs:
        """The same rows and weights with the routing and the expert outputs of other inputs."""
        host = None
        if self.host is not None and other.host is not None:
            host = self.host.routed_as(other.host)
        return replace(
            self,
            topk_idx=other.topk_idx,
            layout=other.layout,
            outputs=other.outputs,
            host=host,
        )

    def rows(self, rank: int) -> Rows:
        """The dense dispatch to `rank`."""
        if self.host is not None:
            return self.host.rows(rank)
        by_part = zip(*(as_tuple(x) for x in self.x), strict=True)
        rows = tuple(dense.dispatch(self.layout, part, rank) for part in by_part)
        return rows if isinstance(self.x[0], tuple) else rows[0]

    def row_weights(self, rank: int) -> Tensor:
        """The dense router weights of the rows of `rank`; 1 where the case is not weighted."""
        if self.host is not None:
            return self.host.row_weights(rank)
        weights = self.topk_weights or tuple(torch.ones(idx.shape) for idx in self.topk_idx)
        return dense.row_weights(self.layout, weights, rank)

    def sums(self, source: int) -> Tensor:
        """The dense combine of `source`."""
        if self.host is not None:
            return self.host.sums(source)
        return dense.combine(
            self.layout,
            self.outputs,
            source,
            self.weights_of(source),
            node_of_rank=self.case.node_of_rank,
        )


def draw(case: Case, round_: int = 0) -> Inputs:
    """The inputs of a case; each `round_` has its own."""
    generator = torch.Generator().manual_seed(case.seed * 1000 + round_)
    topk_idx = tuple(_topk_idx(case, tokens, generator) for tokens in case.num_tokens)
    layout = dense.lay_out(
        topk_idx,
        num_experts=case.num_experts,
        placement=case.placement,
        expert_alignment=case.expert_alignment,
    )
    weights = tuple(torch.rand(idx.shape, generator=generator) for idx in topk_idx)
    inputs = Inputs(
        case=case,
        x=tuple(_rows(case, tokens, generator) for tokens in case.num_tokens),
        topk_idx=topk_idx,
        topk_weights=weights if case.weighted else None,
        layout=layout,
        outputs=tuple(
            torch.randn((len(choices), case.hidden_size), generator=generator).to(case.dtype)
            for choices in layout.choices
        ),
    )
    return inputs if case.device == "cpu" else on_device(inputs, case.device)


def device_of(engine: str) -> str:
    """The kind of device whose tensors an engine is tested with in the default group."""
    is_gpu_node = engine == "two_level" and dist.is_initialized() and _has_nccl()
    return "cuda" if engine == "cuda" or is_gpu_node else "cpu"


def _has_nccl() -> bool:
    world = dist.group.WORLD
    return world is not None and cuda_backend(world) == "nccl"


def tell_nodes(node_of_rank: tuple[int, ...]) -> None:
    """From now on the ranks of this process' groups are told these nodes (`FUSCO_NODE_ID`)."""
    global _told
    _told = node_of_rank


_told: tuple[int, ...] = ()


def on_device(inputs: Inputs, device: str) -> Inputs:
    """The inputs on this rank's device of a kind."""

    def move(rows: Rows) -> Rows:
        moved = tuple(each.to(device) for each in as_tuple(rows))
        return moved if isinstance(rows, tuple) else moved[0]

    weights = inputs.topk_weights
    return replace(
        inputs,
        x=tuple(map(move, inputs.x)),
        topk_idx=tuple(each.to(device) for each in inputs.topk_idx),
        topk_weights=None if weights is None else tuple(each.to(device) for each in weights),
        outputs=tuple(each.to(device) for each in inputs.outputs),
        host=inputs,
    )


def two_nodes(case: Case) -> Case:
    """The case over two nodes where its ranks divide, else over one."""
    half, odd = divmod(case.num_ranks, 2)
    return case if odd else replace(case, ranks_per_node=half)


def expect(condition: bool, what: str) -> None:
    """Raise AssertionError(what) unless the condition holds; also under `python -O`."""
    if not condition:
        raise AssertionError(what)


def expect_same(got: Rows, want: Rows, what: str) -> None:
    """Shape, dtype and every bit (but the sign of a zero) are equal; in tuples, part by part."""
    if isinstance(got, tuple) or isinstance(want, tuple):
        expect(
            isinstance(got, tuple) and isinstance(want, tuple) and len(got) == len(want),
            f"{what}: the structure differs",
        )
        for part, (got_part, want_part) in enumerate(zip(got, want, strict=True)):
            expect_same(got_part, want_part, f"{what}, part {part}")
        return
    expect(got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}")
    expect(got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}")
    got, want = got.detach().cpu(), want.detach().cpu()
    if want.dtype.itemsize == 1:  # fp8 has no comparison of its own
        got, want = got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    if not torch.equal(got, want):
        wrong = (got != want).reshape(len(want), -1).any(1).nonzero().flatten()
        raise AssertionError(
            f"{what}: {len(wrong)} of {len(want)} rows differ, first row {int(wrong[0])}"
        )


def expect_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Shape and dtype are equal, and values within `tolerance`, relative or absolute."""
    expect(got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}")
    expect(got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}")
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    if not torch.allclose(got, want, rtol=tolerance, atol=tolerance):
        raise AssertionError(f"{what}: off by up to {(got - want).abs().max().item():.3g}")


def expect_round_trip(
    shuffle: fusco.Shuffle, inputs: Inputs, rank: int, plan: fusco.Plan | None = None
) -> fusco.Dispatched[Any]:
    """Dispatch and combine equal the dense answer on this rank; returns the dispatch.

    Every call is made before anything is compared, so that a rank at fault keeps no other waiting.
    """
    idx = inputs.topk_idx[rank] if plan is None else None
    d = shuffle.dispatch(inputs.x[rank], idx, inputs.weights_of(rank), plan=plan)
    got = shuffle.combine(inputs.outputs[rank], d) if inputs.case.payload != "bytes" else None
    expect_dispatched(d, inputs, rank)
    if got is not None:
        expect_same(got, inputs.sums(rank), "combine")
    return d


def expect_dispatched(d: fusco.Dispatched[Any], inputs: Inputs, rank: int) -> None:
    """Rows, counts, offsets and row weights equal the dense answer on this rank."""
    layout = inputs.layout
    expect_same(d.tokens_per_expert, layout.tokens_per_expert[rank], "tokens_per_expert")
    expect_same(d.expert_offsets, layout.expert_offsets[rank], "expert_offsets")
    expect_same(d.tokens, inputs.rows(rank), "tokens")
    expect_same(d.row_weights, inputs.row_weights(rank), "row_weights")


def _topk_idx(case: Case, num_tokens: int, generator: torch.Generator) -> Tensor:
    shape = (num_tokens, case.top_k)
    if case.routing == "nobody":
        return torch.full(shape, -1)
    if case.routing == "one-expert":
        return torch.full(shape, case.num_experts - 1)
    if case.routing == "uniform" and case.top_k <= case.num_experts:
        scores = torch.rand((num_tokens, case.num_experts), generator=generator)
        return scores.argsort(dim=1)[:, : case.top_k].contiguous()
    idx = torch.randint(case.num_experts, shape, generator=generator)
    if case.routing == "holes":
        idx[torch.rand(shape, generator=generator) < 0.6] = -1
    return idx


def _rows(case: Case, num_tokens: int, generator: torch.Generator) -> Rows:
    shape = (num_tokens, case.hidden_size)
    if case.payload == "bytes":
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    rows = torch.randn(shape, generator=generator)
    if case.payload == "scaled":
        scales = torch.rand((num_tokens, case._num_scales), generator=generator)
        return rows.to(torch.float8_e4m3fn), scales
    return rows.to(case.dtype)


def sizes(num_tokens: Sequence[int], group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """Token counts for every rank of `group`, by repeating `num_tokens`."""
    return tuple(num_tokens[rank % len(num_tokens)] for rank in range(dist.get_world_size(group)))
