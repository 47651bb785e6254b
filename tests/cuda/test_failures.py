"""How failures that kernels report become errors, with the kernels left out."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusco.engines.agreement import Call
from fusco.engines.cuda.failures import Failures
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.kernels.structs import Verdict
from fusco.errors import (
    DisagreementError,
    FuscoError,
    InputError,
    PeerError,
    WindowMemoryError,
    input_error,
)
from fusco.layout.records import Operation

TICKET, EPOCH = 7, 5
RIGHT = Call(operation=Operation.COMBINE, plan=3)
WRONG = Call(
    operation=Operation.COMBINE,
    plan=3,
    error=input_error("combine", "rows", got="2", expected="3", remedy="count them"),
)


class Board:
    """A bulletin in one process, and what ranks have published for their last operation."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, int], str] = {}
        self.heads: dict[int, tuple[int, ...]] = {}

    def of(self, rank: int) -> Any:
        return SimpleNamespace(
            post=lambda topic, text: self.texts.__setitem__((topic, rank), text),
            read=lambda topic, peer: self.texts[topic, peer],
        )


class Rank:
    """Failures of one rank of two, and what its kernels would write."""

    def __init__(self, rank: int, board: Board, max_recv_tokens: int | None = None) -> None:
        topology = SimpleNamespace(rank=rank, num_ranks=2, num_experts=4)
        world = SimpleNamespace(topology=topology, timeout_s=60.0, max_recv_tokens=max_recv_tokens)
        names = [name for name, _ in structs.Failure._fields_]
        self._place = {name: at for at, name in enumerate(names)}
        self.told = np.zeros(len(names), dtype=np.int64)
        self.pending = torch.zeros(1, dtype=torch.int32)
        self.failures = Failures(
            world,  # type: ignore[arg-type]
            board.of(rank),
            self.told,
            self.pending,
            lambda _, peer: board.heads[peer],
        )
        self._publish = partial(board.heads.__setitem__, rank)

    def ask(self, call: Call, *, epoch: int = EPOCH) -> None:
        self.failures.remember(TICKET, call)
        self._publish(call.head(epoch))

    def fail(self, verdict: Verdict, **fields: int) -> None:
        facts = {"operation": Operation.COMBINE, "ticket": TICKET, "awaited": -1, "epoch": EPOCH}
        for name, value in (facts | fields | {"verdict": verdict}).items():
            self.told[self._place[name]] = value
        self.pending.fill_(EPOCH)

    def error(self) -> FuscoError:
        with pytest.raises(FuscoError) as caught:
            self.failures.raise_pending()
        return caught.value

    def is_settled(self) -> bool:
        return not self.told.any() and not self.pending.any()


def two_ranks(wrong: int = 1, **changes: Any) -> tuple[Rank, Rank]:
    board = Board()
    ranks = Rank(0, board, **changes), Rank(1, board, **changes)
    for rank, each in enumerate(ranks):
        each.ask(WRONG if rank == wrong else RIGHT)
        each.fail(Verdict.UNLIKE)
    return ranks


def test_a_wrong_call_is_raised_by_all_with_its_rank() -> None:
    right, wrong = two_ranks()
    with pytest.raises(InputError, match="count them") as caught:
        wrong.failures.raise_own(TICKET, WRONG, all_settle=False)
    assert caught.value.__suppress_context__, "it is told once"
    error = right.error()
    assert isinstance(error, InputError)
    assert "rank 1" in str(error)
    assert right.is_settled()
    assert wrong.is_settled()


def test_who_has_raised_before_the_others_raises_again_with_them() -> None:
    _, wrong = two_ranks()
    with pytest.raises(InputError):
        wrong.failures.raise_own(TICKET, WRONG, all_settle=False)
    wrong.fail(Verdict.STALE, ticket=TICKET + 1)
    assert str(wrong.error()) == str(WRONG.error)


def test_what_a_wrong_rank_raises_at_once_is_not_kept() -> None:
    _, wrong = two_ranks()

    def publish(call: Call) -> None:
        wrong.failures.remember(TICKET, call)
        wrong.failures.raise_own(TICKET, call, all_settle=False)

    def check() -> None:
        assert WRONG.error is not None
        try:
            raise copy(WRONG.error)
        except InputError as error:
            publish(WRONG._replace(error=error))

    assert leaves_nothing(check)


def test_what_is_raised_later_is_not_kept() -> None:
    for rank in reversed(two_ranks()):
        assert leaves_nothing(rank.failures.raise_pending)
        rank.fail(Verdict.STALE, ticket=TICKET + 1)
        assert leaves_nothing(rank.failures.raise_pending)


def leaves_nothing(fail: Callable[[], None]) -> bool:
    """Whether the frames that an error has passed go when it does."""

    def run() -> weakref.ref[Board]:
        local = Board()
        with suppress(InputError):
            fail()
        return weakref.ref(local)

    gc.disable()
    try:
        return run()() is None
    finally:
        gc.enable()


def test_a_wrong_call_after_a_failure_leaves_it_pending() -> None:
    board = Board()
    rank = Rank(1, board)
    rank.failures.remember(TICKET, RIGHT)
    rank.fail(Verdict.SHORT, need=9)
    with pytest.raises(InputError, match="count them"):
        rank.failures.raise_own(TICKET + 1, WRONG, all_settle=False)
    assert not rank.is_settled()
    with pytest.raises(WindowMemoryError):
        rank.failures.raise_own(TICKET + 2, WRONG, all_settle=True)
    assert rank.is_settled()


def test_calls_that_do_not_fit_together() -> None:
    first, second = two_ranks(wrong=-1)
    with pytest.warns(UserWarning, match="dispatch|combine"):
        second.failures.close()  # leaves before it has raised, but not without a word
    assert isinstance(first.error(), DisagreementError)


def test_who_waits_does_not_ask_those_who_go_on() -> None:
    board = Board()
    waiting, summing = Rank(0, board), Rank(1, board)
    waiting.ask(Call(operation=Operation.DISPATCH, form="bfloat16"))
    summing.ask(RIGHT)
    waiting.fail(Verdict.UNLIKE, operation=Operation.DISPATCH)
    summing.fail(Verdict.UNLIKE)
    # The board would fail where it is asked for what nobody has posted.
    error = waiting.error()
    assert isinstance(error, DisagreementError)
    assert "rank 0: dispatch with a new plan, bfloat16; rank 1: combine with plan 3" in str(error)
    assert str(summing.error()).startswith("combine: the ranks' calls do not fit together")
    waiting.fail(Verdict.STALE, operation=Operation.DISPATCH, epoch=EPOCH + 1)
    assert str(waiting.error()) == str(error)


def test_a_loss_takes_the_place_of_what_was_pending() -> None:
    rank = Rank(0, Board())
    rank.ask(RIGHT)
    rank.fail(Verdict.STALE)
    later = threading.Timer(0.1, lambda: rank.fail(Verdict.LOST, awaited=1, item=-1))
    later.start()
    with pytest.raises(PeerError, match="rank 1 is lost"):
        rank.failures.raise_reported(Verdict.LOST)
    later.join()


@pytest.mark.parametrize(
    ("verdict", "kind", "names"),
    [
        (Verdict.SHORT, WindowMemoryError, "max_recv_tokens=9"),
        (Verdict.INVALID, InputError, "plan"),
        (Verdict.STALE, DisagreementError, "earlier"),
    ],
)
def test_what_needs_no_word_of_others(verdict: Verdict, kind: type[FuscoError], names: str) -> None:
    rank = Rank(0, Board(), max_recv_tokens=4)
    rank.fail(verdict, need=9)
    error = rank.error()
    assert isinstance(error, kind)
    assert names in str(error)
    assert rank.is_settled()


def test_a_loss_is_for_good() -> None:
    rank = Rank(0, Board())
    rank.fail(Verdict.LOST, awaited=1, item=-1)
    for call in (rank.failures.raise_lost, rank.failures.raise_pending):
        with pytest.raises(PeerError, match="rank 1 is lost"):
            call()
    assert not rank.is_settled()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"operation": Operation.COMBINE, "awaited": 1, "item": 5, "need": 9}, "token 5 of 9"),
        ({"operation": Operation.DISPATCH, "awaited": 1, "item": 5, "need": 9}, "row 5 of the 9"),
        ({"operation": Operation.DISPATCH, "awaited": 0, "item": -1}, "kept its blocks"),
    ],
)
def test_a_loss_says_what_did_not_come(fields: dict[str, int], says: str) -> None:
    rank = Rank(0, Board())
    rank.fail(Verdict.LOST, **fields)
    with pytest.raises(PeerError, match=says):
        rank.failures.raise_lost()


def test_who_closes_before_an_overflow_was_raised_is_told() -> None:
    rank = Rank(0, Board(), max_recv_tokens=4)
    rank.failures.close()
    rank.fail(Verdict.SHORT, need=9)
    with pytest.warns(UserWarning, match="max_recv_tokens=9"):
        rank.failures.close()


def test_who_closes_before_a_plan_was_refused_is_told() -> None:
    rank = Rank(0, Board())
    rank.fail(Verdict.INVALID)
    with pytest.warns(UserWarning, match="a dispatch which raised an error"):
        rank.failures.close()


def test_who_closes_after_a_loss_has_heard_of_it() -> None:
    rank = Rank(0, Board())
    rank.fail(Verdict.LOST, awaited=1)
    rank.failures.warn()
    rank.failures.close()


def test_a_warning_for_each_failure() -> None:
    rank = Rank(0, Board(), max_recv_tokens=4)
    rank.failures.warn()
    for _ in range(2):
        rank.fail(Verdict.SHORT, need=9)
        with pytest.warns(UserWarning, match="synchronize"):
            rank.failures.warn()
        rank.failures.warn()
        rank.error()
