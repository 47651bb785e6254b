"""Plans in one block of memory, with memory of the CPU: their tensors lie where kernels write."""

from __future__ import annotations

import copy
from itertools import pairwise
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusco.engines.cuda.plans import Addresses, BlockPlan
from fusco.layout.compact import BLOCK_ALIGNMENT, PlanLayout
from fusco.ops import _apart
from fusco.plans import CompactPlan, Plan

STREAM = 5
small = st.integers(1, 9)
layouts = st.builds(
    PlanLayout.of,
    num_tokens=st.integers(0, 70),
    top_k=small,
    num_local=st.integers(0, 40),
    num_ranks=small,
    max_tokens=st.integers(70, 80),
)


def make(layout: PlanLayout) -> tuple[BlockPlan, torch.Tensor]:
    block = torch.arange(layout.end // 4, dtype=torch.int32)
    plan = BlockPlan(
        number=7,
        key=3,
        num_rows=11,
        layout=layout,
        block=block,
        addresses=Addresses.within(block, layout),
        stream=STREAM,
        one=torch.zeros(1, dtype=torch.uint8),
    )
    return plan, block


@given(layout=layouts)
def test_arrays_have_room_and_are_aligned(layout: PlanLayout) -> None:
    plan, block = make(layout)
    compact = plan.compact
    arrays = (compact.tokens_per_expert, compact.expert_offsets, compact.pairs, compact.links)
    starts = [0, layout.expert_offsets, layout.pairs, layout.links, layout.end]
    assert all(start % BLOCK_ALIGNMENT == 0 for start in starts)
    for (begin, end), array in zip(pairwise(starts), arrays, strict=True):
        assert array.nbytes <= end - begin
        if array.numel():
            assert array.data_ptr() == block.data_ptr() + begin


@given(layout=layouts)
def test_a_plan_is_the_same_in_a_block_and_as_tensors(layout: PlanLayout) -> None:
    plan, _ = make(layout)
    again = Plan.from_tensors(plan.to_tensors())
    assert isinstance(again, CompactPlan)
    for each in (plan, again):
        assert (each.number, each.key, each.num_rows) == (7, 3, 11)
        assert (each.num_tokens, each.top_k) == (layout.num_tokens, layout.top_k)
        assert each.device == torch.device("cpu")
        assert each.tokens_per_expert.shape == (layout.num_local,)
        assert each.expert_offsets.shape == (layout.num_local + 1,)
    if layout.num_tokens and layout.num_local:
        assert Addresses.of(again, STREAM) == Addresses.of(plan, STREAM)
    assert plan.addresses.links == again.links.data_ptr()


def test_a_copy_has_addresses_of_its_own() -> None:
    layout = PlanLayout.of(num_tokens=5, top_k=2, num_local=3, num_ranks=2, max_tokens=8)
    plan, block = make(layout)
    again = copy.deepcopy(plan)
    assert all(
        torch.equal(*each) for each in zip(again.to_tensors(), plan.to_tensors(), strict=True)
    )
    begin, end = block.data_ptr(), block.data_ptr() + block.nbytes
    assert not any(begin <= address < end for address in Addresses.of(again, STREAM))


def test_results_of_an_operator_share_no_memory() -> None:
    layout = PlanLayout.of(num_tokens=5, top_k=2, num_local=3, num_ranks=2, max_tokens=8)
    plan, _ = make(layout)
    flat = plan.to_tensors()
    apart = _apart(flat)
    assert len({each.untyped_storage().data_ptr() for each in apart}) == len(apart)
    assert all(torch.equal(one, other) for one, other in zip(flat, apart, strict=True))


def test_memory_is_kept_for_every_stream_that_reads_it() -> None:
    plan, _ = make(PlanLayout.of(num_tokens=3, top_k=2, num_local=2, num_ranks=2, max_tokens=4))
    with mock.patch.object(BlockPlan, "record_current_stream") as record:
        Addresses.of(plan, STREAM)
        record.assert_not_called()
        Addresses.of(plan, STREAM + 1)
        record.assert_called_once()
