"""Wrong calls, each with the error that it must raise on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fusco
from fusco.testing.cases import Case, Inputs, device_of, draw, expect, expect_round_trip

CASE = Case(num_tokens=(5, 8, 3), hidden_size=16, top_k=2, num_experts=6)
"""What the calls below are made for; on any kind of device."""
_PROMPT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a mistake can use: a Shuffle in working order, and all that a right call takes."""

    shuffle: fusco.Shuffle
    other: fusco.Shuffle
    d: fusco.Dispatched[Any]
    d_other: fusco.Dispatched[Any]
    inputs: Inputs
    rank: int

    @property
    def x(self) -> Tensor:
        x = self.inputs.x[self.rank]
        assert isinstance(x, Tensor)
        return x

    @property
    def idx(self) -> Tensor:
        return self.inputs.topk_idx[self.rank]

    @property
    def weights(self) -> Tensor:
        weights = self.inputs.weights_of(self.rank)
        assert weights is not None
        return weights

    @property
    def outputs(self) -> Tensor:
        return self.inputs.outputs[self.rank]

    def dispatch(self, **changes: Any) -> Any:
        right: dict[str, Any] = {"x": self.x, "topk_idx": self.idx, "topk_weights": self.weights}
        return self.shuffle.dispatch(**(right | changes))

    def reuse(self, **changes: Any) -> Any:
        right: dict[str, Any] = {"x": self.x, "topk_weights": self.weights, "plan": self.d.plan}
        return self.shuffle.dispatch(**(right | changes))

    def combine(self, outputs: Any, d: Any = None) -> Any:
        return self.shuffle.combine(outputs, self.d if d is None else d)


def _right(ready: Ready) -> object:
    return ready.dispatch()


def _right_reuse(ready: Ready) -> object:
    return ready.reuse()


def _right_combine(ready: Ready) -> object:
    return ready.combine(ready.outputs)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A wrong call on the ranks `by`, a right one elsewhere, and the error of every rank."""

    call: Callable[[Ready], object]
    error: type[fusco.FuscoError] = fusco.InputError
    names: str
    elsewhere: Callable[[Ready], object] = _right
    by: tuple[int, ...] = (1,)


def _with_id(ready: Ready, expert: int, others: Tensor | None = None) -> Tensor:
    idx = (ready.idx if others is None else others).clone()
    idx[-1, -1] = expert
    return idx


def _one_more(t: Tensor, dim: int) -> Tensor:
    return torch.cat((t, t.narrow(dim, 0, 1)), dim)


def _wanting(ready: Ready, dtype: torch.dtype) -> Tensor:
    """Rows of no more bytes than the right ones, and whole units of 16, that want a gradient."""
    return ready.x[:, : 64 // dtype.itemsize].to(dtype).requires_grad_()


def _without_gradients(ready: Ready, dtype: torch.dtype) -> object:
    with torch.no_grad():
        return ready.dispatch(x=_wanting(ready, dtype))


def _again_with_gradients(ready: Ready, dtype: torch.dtype) -> object:
    """What the Shuffle has accepted without."""
    _without_gradients(ready, dtype)
    return ready.dispatch(x=_wanting(ready, dtype))


def _combine_with(ready: Ready, row_weights: Tensor) -> object:
    """With others than the right ones, when the Shuffle has accepted those."""
    _right_combine(ready)
    return ready.combine(ready.outputs, replace(ready.d, row_weights=row_weights))


def _too_many(ready: Ready) -> object:
    rows = (max(CASE.num_tokens) + 1, 1)
    return ready.dispatch(
        x=ready.x[:1].repeat(rows),
        topk_idx=ready.idx[:1].repeat(rows),
        topk_weights=ready.weights[:1].repeat(rows),
    )


_DISAGREE = fusco.DisagreementError

MISTAKES: Mapping[str, Mistake] = {
    # rows
    "x-is-a-list": Mistake(call=lambda r: r.dispatch(x=r.x.tolist()), names="x"),
    "x-is-a-number": Mistake(call=lambda r: r.dispatch(x=1.0), names="x"),
    "x-is-missing": Mistake(call=lambda r: r.dispatch(x=None), names="x"),
    "x-has-no-rows": Mistake(call=lambda r: r.dispatch(x=torch.zeros(())), names="x"),
    "x-has-no-width": Mistake(call=lambda r: r.dispatch(x=r.x[:, :0]), names="no bytes"),
    "x-has-no-width-everywhere": Mistake(
        call=lambda r: r.dispatch(x=r.x[:, :0]), names="no bytes", by=(0, 1, 2)
    ),
    "x-is-a-tuple-with-one-of-no-width": Mistake(
        call=lambda r: r.dispatch(x=(r.x[:, :4], r.x[:, :0])), names="no bytes", by=(0, 1, 2)
    ),
    "x-is-too-wide": Mistake(call=lambda r: r.dispatch(x=_one_more(r.x, 1)), names="x"),
    "x-is-too-wide-everywhere": Mistake(
        call=lambda r: r.dispatch(x=_one_more(r.x, 1)), names="x", by=(0, 1, 2)
    ),
    "x-dtype-is-too-wide": Mistake(
        call=lambda r: r.dispatch(x=r.x.double()), names="128 bytes, float64[*, 16], expected"
    ),
    "x-is-a-batch": Mistake(call=lambda r: r.dispatch(x=r.x[None]), names="pass x.flatten(0, 1)"),
    "x-is-narrower-here": Mistake(
        call=lambda r: r.dispatch(x=r.x[:, :-4]), names="dispatch", error=_DISAGREE
    ),
    "x-dtype-differs-here": Mistake(
        call=lambda r: r.dispatch(x=r.x.half()), names="float16", error=_DISAGREE
    ),
    "x-is-elsewhere": Mistake(call=lambda r: r.dispatch(x=r.x.to("meta")), names="x"),
    "all-is-elsewhere": Mistake(
        call=lambda r: r.dispatch(
            x=r.x.to("meta"), topk_idx=r.idx.to("meta"), topk_weights=r.weights.to("meta")
        ),
        names="x",
    ),
    "x-is-a-tuple-of-none": Mistake(call=lambda r: r.dispatch(x=()), names="x"),
    "x-is-a-tuple-of-two-lengths": Mistake(
        call=lambda r: r.dispatch(x=(r.x[:, :4], r.x[1:, :4])), names="x"
    ),
    "x-is-a-tuple-here": Mistake(
        call=lambda r: r.dispatch(x=(r.x[:, :4], r.x[:, :4])), names="dispatch", error=_DISAGREE
    ),
    "x-wants-gradients-here": Mistake(
        call=lambda r: r.dispatch(x=r.x.clone().requires_grad_()),
        names="gradients",
        error=_DISAGREE,
    ),
    "x-wants-gradients-of-complex-numbers": Mistake(
        call=lambda r: _again_with_gradients(r, torch.complex64),
        names="got torch.complex64 that requires a gradient",
        elsewhere=lambda r: (_without_gradients(r, torch.complex64), _right(r)),
    ),
    "x-wants-gradients-of-complex-numbers-everywhere": Mistake(
        call=lambda r: _again_with_gradients(r, torch.complex64),
        names="torch.view_as_real",
        by=(0, 1, 2),
    ),
    "x-wants-gradients-of-8-bits-everywhere": Mistake(
        call=lambda r: _again_with_gradients(r, torch.float8_e4m3fn),
        names="x.detach()",
        by=(0, 1, 2),
    ),
    "x-is-a-tuple-with-gradients-of-8-bits": Mistake(
        call=lambda r: r.dispatch(x=(r.x[:, :8], _wanting(r, torch.float8_e4m3fn))),
        names="got torch.float8_e4m3fn that requires a gradient",
        by=(0, 1, 2),
    ),
    "too-many-tokens": Mistake(call=_too_many, names="max_tokens"),
    # routing
    "idx-is-float": Mistake(call=lambda r: r.dispatch(topk_idx=r.idx.float()), names="topk_idx"),
    "idx-is-flat": Mistake(call=lambda r: r.dispatch(topk_idx=r.idx[:, 0]), names="topk_idx"),
    "idx-has-other-k": Mistake(
        call=lambda r: r.dispatch(topk_idx=_one_more(r.idx, 1)), names="topk_idx"
    ),
    "idx-has-other-t": Mistake(
        call=lambda r: r.dispatch(topk_idx=_one_more(r.idx, 0)), names="topk_idx"
    ),
    "id-too-large": Mistake(
        call=lambda r: r.dispatch(topk_idx=_with_id(r, CASE.num_experts)), names="topk_idx"
    ),
    "id-too-small": Mistake(
        call=lambda r: r.dispatch(topk_idx=_with_id(r, -2)), names="topk_idx", by=(0, 2)
    ),
    "ids-are-all-too-small": Mistake(
        call=lambda r: r.dispatch(topk_idx=torch.full_like(r.idx, -2)),
        names="got expert ids such as -2, expected",
    ),
    "ids-are-all-too-small-and-differ": Mistake(
        call=lambda r: r.dispatch(topk_idx=_with_id(r, -4, torch.full_like(r.idx, -2))),
        names="got expert ids such as -4, expected",
    ),
    "one-id-too-small-and-no-others": Mistake(
        call=lambda r: r.dispatch(topk_idx=_with_id(r, -3, torch.full_like(r.idx, -1))),
        names="got expert ids such as -3, expected",
    ),
    "one-id-too-large-and-no-others": Mistake(
        call=lambda r: r.dispatch(topk_idx=_with_id(r, 6, torch.full_like(r.idx, -1))),
        names="got expert ids such as 6, expected",
    ),
    "ids-on-both-sides": Mistake(
        call=lambda r: r.dispatch(topk_idx=_with_id(r, 9, torch.full_like(r.idx, -2))),
        names="got expert ids such as -2 and 9, expected",
    ),
    "id-huge": Mistake(call=lambda r: r.dispatch(topk_idx=_with_id(r, 2**40)), names="topk_idx"),
    "idx-is-elsewhere": Mistake(
        call=lambda r: r.dispatch(topk_idx=r.idx.to("meta")), names="topk_idx"
    ),
    "idx-is-sparse": Mistake(
        call=lambda r: r.dispatch(topk_idx=r.idx.to_sparse()), names="topk_idx: got torch.int64"
    ),
    "no-routing": Mistake(call=lambda r: r.dispatch(topk_idx=None), names="topk_idx"),
    # weights
    "weights-are-integers": Mistake(
        call=lambda r: r.dispatch(topk_weights=r.weights.long()), names="topk_weights"
    ),
    "weights-have-other-shape": Mistake(
        call=lambda r: r.dispatch(topk_weights=_one_more(r.weights, 0)), names="topk_weights"
    ),
    "weights-are-elsewhere": Mistake(
        call=lambda r: r.dispatch(topk_weights=r.weights.to("meta")), names="topk_weights"
    ),
    "weights-are-sparse": Mistake(
        call=lambda r: r.dispatch(topk_weights=r.weights.to_sparse()), names="torch.sparse_coo"
    ),
    "weights-are-a-list": Mistake(
        call=lambda r: r.dispatch(topk_weights=r.weights.tolist()), names="topk_weights"
    ),
    "no-weights-here": Mistake(
        call=lambda r: r.dispatch(topk_weights=None), names="weights", error=_DISAGREE
    ),
    # plans
    "plan-and-routing": Mistake(
        call=lambda r: r.reuse(topk_idx=r.idx), names="plan", elsewhere=_right_reuse
    ),
    "plan-is-a-dispatch": Mistake(
        call=lambda r: r.reuse(plan=r.d), names="plan", elsewhere=_right_reuse
    ),
    "plan-of-another-shuffle": Mistake(
        call=lambda r: r.reuse(plan=r.d_other.plan), names="plan", elsewhere=_right_reuse
    ),
    "plan-of-another-shuffle-everywhere": Mistake(
        call=lambda r: r.reuse(plan=r.d_other.plan), names="plan", by=(0, 1, 2)
    ),
    "plan-has-other-t": Mistake(
        call=lambda r: r.reuse(x=r.x[1:], topk_weights=r.weights[1:]),
        names="x",
        elsewhere=_right_reuse,
    ),
    "plan-has-other-weights": Mistake(
        call=lambda r: r.reuse(topk_weights=r.weights[1:]),
        names="topk_weights",
        elsewhere=_right_reuse,
    ),
    "plan-here-only": Mistake(call=_right_reuse, names="plan", error=_DISAGREE),
    "plan-is-older-here": Mistake(
        call=lambda r: (r.dispatch(), r.reuse())[1],
        elsewhere=lambda r: r.reuse(plan=r.dispatch().plan),
        names="plan",
        error=_DISAGREE,
    ),
    # outputs
    "outputs-are-a-list": Mistake(
        call=lambda r: r.combine([1.0]), names="expert_outputs", elsewhere=_right_combine
    ),
    "outputs-are-missing": Mistake(
        call=lambda r: r.combine(None), names="expert_outputs", elsewhere=_right_combine
    ),
    "outputs-dtype-is-too-wide": Mistake(
        call=lambda r: r.combine(r.outputs.double()),
        names="128 bytes, float64[*, 16], expected",
        elsewhere=_right_combine,
    ),
    "outputs-are-a-batch": Mistake(
        call=lambda r: r.combine(r.outputs[None]),
        names="pass expert_outputs.flatten(0, 1)",
        elsewhere=_right_combine,
    ),
    "outputs-are-integers": Mistake(
        call=lambda r: r.combine(r.outputs.long()),
        names="expert_outputs",
        elsewhere=_right_combine,
    ),
    "outputs-are-bytes-everywhere": Mistake(
        call=lambda r: r.combine(r.outputs.to(torch.uint8)),
        names="expert_outputs",
        by=(0, 1, 2),
    ),
    "outputs-have-other-r": Mistake(
        call=lambda r: r.combine(_one_more(r.outputs, 0)),
        names="expert_outputs",
        elsewhere=_right_combine,
        by=(2,),
    ),
    "outputs-are-too-wide": Mistake(
        call=lambda r: r.combine(_one_more(r.outputs, 1)),
        names="expert_outputs",
        elsewhere=_right_combine,
    ),
    "outputs-have-no-width-everywhere": Mistake(
        call=lambda r: r.combine(r.outputs[:, :0]), names="no bytes", by=(0, 1, 2)
    ),
    "outputs-are-narrower-here": Mistake(
        call=lambda r: r.combine(r.outputs[:, :-4]),
        names="combine",
        error=_DISAGREE,
        elsewhere=_right_combine,
    ),
    "outputs-dtype-differs-here": Mistake(
        call=lambda r: r.combine(r.outputs.bfloat16()),
        names="bfloat16",
        error=_DISAGREE,
        elsewhere=_right_combine,
    ),
    "outputs-are-elsewhere": Mistake(
        call=lambda r: r.combine(r.outputs.to("meta")),
        names="expert_outputs",
        elsewhere=_right_combine,
    ),
    "row-weights-are-sparse": Mistake(
        call=lambda r: _combine_with(r, r.d.row_weights.to_sparse()),
        names="row_weights: got",
        elsewhere=lambda r: _combine_with(r, r.d.row_weights),
    ),
    "row-weights-are-elsewhere": Mistake(
        call=lambda r: _combine_with(r, r.d.row_weights.to("meta")),
        names="row_weights: got",
        elsewhere=lambda r: _combine_with(r, r.d.row_weights),
    ),
    "combine-of-a-plan": Mistake(
        call=lambda r: r.combine(r.outputs, r.d.plan),
        names="dispatched",
        elsewhere=_right_combine,
    ),
    "combine-of-another-shuffle": Mistake(
        call=lambda r: r.combine(r.outputs, r.d_other),
        names="another Shuffle",
        elsewhere=_right_combine,
    ),
    # calls that do not fit together
    "another-call-here": Mistake(
        call=_right_combine, elsewhere=_right, names="combine", error=_DISAGREE
    ),
}

CUDA_MISTAKES: Mapping[str, Mistake] = {
    "rows-are-not-16-bytes": Mistake(call=lambda r: r.dispatch(x=r.x[:, :1]), names="16 bytes"),
    "rows-are-not-16-bytes-everywhere": Mistake(
        call=lambda r: r.dispatch(x=r.x[:, :3]), names="16 bytes", by=(0, 1, 2)
    ),
    "too-many-tensors": Mistake(call=lambda r: r.dispatch(x=(r.x[:, :4],) * 5), names="5 tensors"),
    "x-is-on-the-cpu": Mistake(call=lambda r: r.dispatch(x=r.x.cpu()), names="x"),
    "all-is-on-the-cpu": Mistake(
        call=lambda r: r.dispatch(x=r.x.cpu(), topk_idx=r.idx.cpu(), topk_weights=r.weights.cpu()),
        names="x",
    ),
    "idx-is-on-the-cpu": Mistake(call=lambda r: r.dispatch(topk_idx=r.idx.cpu()), names="topk_idx"),
    "weights-are-on-the-cpu": Mistake(
        call=lambda r: r.dispatch(topk_weights=r.weights.cpu()), names="topk_weights"
    ),
    "outputs-are-on-the-cpu": Mistake(
        call=lambda r: r.combine(r.outputs.cpu()),
        names="expert_outputs",
        elsewhere=_right_combine,
    ),
    "outputs-are-not-16-bytes": Mistake(
        call=lambda r: r.combine(r.outputs[:, :3]),
        names="16 bytes",
        elsewhere=_right_combine,
    ),
}
"""More of them for the CUDA engine."""


def make_mistake(mistake: Mistake, group: dist.ProcessGroup | None, engine: str) -> tuple[str, ...]:
    """Make a wrong call on some of three ranks, and then a right one on all.

    Returns:
        the type and the text of this rank's error, what went wrong after it, if anything, and
        "late" if the error was not prompt.
    """
    case = replace(CASE, device=device_of(engine))
    rank, inputs = dist.get_rank(group), draw(case)
    with (
        case.shuffle(group, engine, timeout_s=30.0) as shuffle,
        case.shuffle(group, engine, timeout_s=30.0) as other,
    ):
        arguments = inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank)
        ready = Ready(
            shuffle=shuffle,
            other=other,
            d=shuffle.dispatch(*arguments),
            d_other=other.dispatch(*arguments),
            inputs=inputs,
            rank=rank,
        )
        call = mistake.call if rank in mistake.by else mistake.elsewhere
        started = time.monotonic()
        try:
            call(ready)
            shuffle.synchronize()  # where a combine returns before the others have agreed to it
            raised = ("nothing", "")
        except Exception as error:  # noqa: BLE001 (which one it is, is what the test is about)
            raised = (type(error).__name__, str(error))
        late = time.monotonic() - started > _PROMPT_S
        try:
            expect_round_trip(shuffle, draw(case, 1), rank)
            after = ""
        except Exception as error:  # noqa: BLE001 (likewise)
            after = f"{type(error).__name__}: {error}"
    return (*raised, after, "late" if late else "")


def expect_mistake(mistake: Mistake, outcome: tuple[str, ...], rank: int) -> None:
    """What `make_mistake` has returned on this rank is as it must be."""
    raised, text, after, late = outcome
    expect(raised == mistake.error.__name__, f"rank {rank}: {raised}: {text}")
    expect(mistake.names in text, f"rank {rank}: the error does not say it: {text}")
    if mistake.error is fusco.InputError and rank not in mistake.by:
        expect(f"rank {mistake.by[0]}" in text, f"rank {rank}: the error does not say who: {text}")
    expect(not after, f"rank {rank}: the next call: {after}")
    expect(not late, f"rank {rank}: not prompt")
