"""Plans as the kernels write them: all arrays in one block of memory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusco.layout.compact import PlanLayout
from fusco.plans import CompactPlan, Plan


class Addresses(NamedTuple):
    """Where the arrays of a plan lie; see `CompactPlan`."""

    tokens_per_expert: int
    expert_offsets: int
    pairs: int
    links: int

    @classmethod
    def within(cls, block: Tensor, layout: PlanLayout) -> Addresses:
        """Of arrays in a block."""
        base = block.data_ptr()
        offsets, pairs, links = layout.expert_offsets, layout.pairs, layout.links
        return cls(base, base + offsets, base + pairs, base + links)

    @classmethod
    def of(cls, plan: Plan, stream: int) -> Addresses:
        """Of the arrays of any plan that this engine made, which the current stream will read.

        Args:
            plan: whose.
            stream: the current stream's handle.
        """
        if isinstance(plan, BlockPlan):
            if stream != plan.stream:
                plan.record_current_stream()
            return plan.addresses
        assert isinstance(plan, CompactPlan), "plans come from this engine"
        return cls(
            plan.tokens_per_expert.data_ptr(),
            plan.expert_offsets.data_ptr(),
            plan.pairs.data_ptr(),
            plan.links.data_ptr(),
        )


class BlockPlan(Plan):
    """A `CompactPlan` in one block of memory. Its tensors, which cost as much as launching a kernel
    each, are made when somebody looks at them.

    Args:
        number: the number that all ranks know it by.
        key: of the Shuffle.
        num_rows: R.
        layout: of the block.
        block: int32.
        addresses: of the arrays in it.
        stream: handle of the stream that the plan was made on.
        one: uint8 `[1]`, of which `row_extent` is made.
    """

    addresses: Addresses
    stream: int
    _number: int
    _key: int
    _num_rows: int
    _layout: PlanLayout
    _block: Tensor
    _one: Tensor

    def __init__(
        self,
        *,
        number: int,
        key: int,
        num_rows: int,
        layout: PlanLayout,
        block: Tensor,
        addresses: Addresses,
        stream: int,
        one: Tensor,
    ) -> None:
        # All at once, for the way past a frozen class is long.
        vars(self).update(
            _number=number,
            _key=key,
            _num_rows=num_rows,
            _layout=layout,
            _block=block,
            addresses=addresses,
            stream=stream,
            _one=one,
        )

    def record_current_stream(self) -> None:
        """Keep the memory until what the current stream does now is done."""
        self._block.record_stream(torch.cuda.current_stream(self._block.device))

    @functools.cached_property
    def compact(self) -> CompactPlan:
        """The same as tensors."""
        layout, block = self._layout, self._block

        def part(start: int, shape: tuple[int, ...]) -> Tensor:
            return block[start // 4 :][: torch.Size(shape).numel()].view(shape)

        num_local = layout.num_local
        return CompactPlan(
            identity=torch.tensor((self._number, self._key), device="cpu"),
            tokens_per_expert=part(0, (2 * num_local,)).view(torch.int64),
            expert_offsets=part(layout.expert_offsets, (num_local + 1,)),
            pairs=part(layout.pairs, (2, layout.num_tokens, layout.top_k)),
            links=part(layout.links, (layout.links_len,)),
            row_extent=self._one.expand(self._num_rows),
        )

    @property
    def number(self) -> int:
        return self._number

    @property
    def key(self) -> int:
        return self._key

    @property
    def device(self) -> torch.device:
        return self._block.device

    @property
    def num_tokens(self) -> int:
        return self._layout.num_tokens

    @property
    def top_k(self) -> int:
        return self._layout.top_k

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def identity(self) -> Tensor:
        return self.compact.identity

    @property
    def tokens_per_expert(self) -> Tensor:
        return self.compact.tokens_per_expert

    @property
    def expert_offsets(self) -> Tensor:
        return self.compact.expert_offsets

    def to_tensors(self) -> list[Tensor]:
        return self.compact.to_tensors()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are made of the tensors, since addresses hold for this block alone."""
        return Plan.from_tensors, (self.to_tensors(),)
