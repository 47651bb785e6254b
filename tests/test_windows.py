"""Windows: they grow when a load needs it, are reused, and hold rows as long as someone does."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

import fusco
from fusco.engines.cpu.window import Mapping
from fusco.testing.cases import Case, device_of, draw, expect_dispatched, expect_round_trip
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(40, 8, 23), hidden_size=128, top_k=4, num_experts=6)


def on(engine: str) -> Case:
    return replace(CASE, device=device_of(engine))


def grow(rank: int, engine: str) -> list[int]:
    """Window bytes after loads of growing and of shrinking size, in one Shuffle."""
    case = replace(on(engine), num_tokens=(2000, 2000, 2000), hidden_size=64)
    loads = [replace(case, num_tokens=(n,) * 3, seed=n) for n in (1, 30, 2000, 2, 0, 700)]
    loads.insert(3, replace(loads[2], routing="one-expert"))
    group = subgroup((0, 1, 2))
    if group is None:
        return []
    seen = []
    with case.shuffle(group, engine) as shuffle:
        for load in loads:
            expect_round_trip(shuffle, draw(load), rank)
            seen.append(shuffle.stats().window_bytes)
    return seen


def test_windows_grow_and_stay(pool: RankPool, engine: str) -> None:
    for seen in pool.run(grow, engine)[:3]:
        # Once the largest load has come, smaller ones ask for nothing.
        assert seen[4:] == [seen[3]] * (len(seen) - 4)


def keep_many_layers(rank: int, engine: str) -> tuple[int, int]:
    """Hold the rows of many layers, as autograd does; then drop them, again and again."""
    case, group = on(engine), subgroup((0, 1, 2))
    if group is None:
        return 0, 0
    inputs = [draw(case, round_) for round_ in range(3)]
    window_bytes = []
    with case.shuffle(group, engine) as shuffle:
        for _ in range(4):
            held = []
            for layer in range(8):
                now = inputs[layer % 3]
                held.append(shuffle.dispatch(now.x[rank], now.topk_idx[rank], now.weights_of(rank)))
            for layer, d in enumerate(held):  # nobody wrote over what is held
                expect_dispatched(d, inputs[layer % 3], rank)
            window_bytes.append(shuffle.stats().window_bytes)
            del held, d
            gc.collect()
    return window_bytes[0], window_bytes[-1]


def test_rows_are_held_for_many_layers(pool: RankPool, engine: str) -> None:
    for first, last in pool.run(keep_many_layers, engine)[:3]:
        assert last == first


def iterate(rank: int, engine: str) -> tuple[int, int, int]:
    """Training-like steps with changing routing: window bytes early and late, and open files."""
    case, group = on(engine), subgroup((0, 1, 2))
    if group is None:
        return 0, 0, 0
    inputs = [draw(case, round_) for round_ in range(5)]
    early = files = 0
    with case.shuffle(group, engine) as shuffle:
        for step in range(300):
            now = inputs[step % 5]
            leaf = now.x[rank].detach().requires_grad_()  # type: ignore[union-attr]
            d = shuffle.dispatch(leaf, now.topk_idx[rank], now.weights_of(rank))
            assert isinstance(d.tokens, Tensor)
            shuffle.combine(d.tokens, d).sum().backward()
            if step == 49:
                early, files = shuffle.stats().window_bytes, open_files()
        return early, shuffle.stats().window_bytes, open_files() - files


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_grows_over_iterations(pool: RankPool, engine: str) -> None:
    for early, late, more_files in pool.run(iterate, engine)[:3]:
        assert late == early
        assert more_files <= 0


def open_and_close(rank: int, engine: str) -> tuple[int, int]:
    """Mappings and files of this process before and after many Shuffles."""
    case, group = on(engine), subgroup((0, 1, 2))
    if group is None:
        return 0, 0
    inputs = draw(case)
    before = (0, 0)
    for turn in range(12):
        with case.shuffle(group, engine) as shuffle:
            expect_round_trip(shuffle, inputs, rank)
        del shuffle
        gc.collect()
        if turn == 3:
            before = (shared_mappings(), open_files())
    return shared_mappings() - before[0], open_files() - before[1]


def shared_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:" in line or "/dev/shm" in line for line in maps)


def test_closing_gives_everything_back(pool: RankPool, host_engine: str) -> None:
    for mappings, files in pool.run(open_and_close, host_engine)[:3]:
        assert mappings <= 0
        assert files <= 0


def peers_forget(rank: int, engine: str) -> None:
    """Rows written by peers are as private as any tensor: writing to them harms nobody."""
    case, group = on(engine), subgroup((0, 1, 2))
    if group is None:
        return
    inputs = draw(case)
    with case.shuffle(group, engine) as shuffle:
        for _ in range(3):
            d = shuffle.dispatch(inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank))
            expect_dispatched(d, inputs, rank)
            assert isinstance(d.tokens, Tensor)
            d.tokens.fill_(torch.nan)
            d.row_weights.fill_(torch.nan)
            expect_round_trip(shuffle, inputs, rank)


def test_received_rows_may_be_written_to(pool: RankPool, engine: str) -> None:
    pool.run(peers_forget, engine)


def grow_without_room(rank: int) -> str:
    """Rank 1 can have more memory, but not map it."""
    case = replace(CASE, num_tokens=(2000, 2000, 2000))
    inputs, group = draw(case), subgroup((0, 1, 2))
    if group is None:
        return ""
    arguments = inputs.x[rank], inputs.topk_idx[rank], inputs.weights_of(rank)
    with case.shuffle(group, "cpu") as shuffle:
        full = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        no_room = mock.patch.object(Mapping, "remapped", side_effect=full)
        with (
            no_room if rank == 1 else contextlib.nullcontext(),
            pytest.raises(fusco.WindowMemoryError) as found,
        ):
            shuffle.dispatch(*arguments)
        expect_round_trip(shuffle, inputs, rank)
    return str(found.value)


def test_no_room_to_grow_is_an_error_of_all(pool: RankPool) -> None:
    texts = pool.run(grow_without_room)[:3]
    assert "Cannot allocate memory" in texts[1]
    assert all("rank 1: no memory left" in texts[rank] for rank in (0, 2))
