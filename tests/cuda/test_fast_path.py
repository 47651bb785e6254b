"""The code in C that serves small calls: compiled cleanly, kept, left out where it cannot be."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from emulator import emulated

import fusco
from fusco import env
from fusco.engines.agreement import Call
from fusco.engines.cuda.fast_path import build, problem
from fusco.engines.cuda.plans import Addresses, BlockPlan
from fusco.layout.heap import Block
from fusco.testing.cases import Case, draw, expect_round_trip
from fusco.testing.check import Verdict
from fusco.testing.gpu.runner import run_check
from fusco.testing.ranks import RankPool, subgroup

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, build._COMPILERS)), reason="no C compiler is here"
)
STRICT = ("-Wall", "-Wextra", "-Werror")
# What the interface of Python's modules itself does not heed.
LAX = ("-Wno-missing-field-initializers", "-Wno-cast-function-type")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    return tmp_path / "host"


def test_compiles_without_warnings() -> None:
    try:
        assert build.compile_library(*STRICT, *LAX).startswith(b"\x7fELF")
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr.decode())


def test_the_second_time_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert not problem()
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    monkeypatch.setattr(build, "compile_library", lambda: pytest.fail("compiled again"))
    build._load.cache_clear()
    assert build.load() is not None


def test_what_cannot_be_kept_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert build.load() is not None


def test_a_broken_library_is_compiled_anew() -> None:
    path = build.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF and no more")
    assert not problem()
    assert path.stat().st_size > 1000


def test_what_it_depends_on_is_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [build.library_path()]
    monkeypatch.setattr(build, "declarations", lambda: "other structs")
    names.append(build.library_path())
    monkeypatch.setattr(sys, "version", "another Python")
    names.append(build.library_path())
    assert len(set(names)) == 3


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_COMPILERS", ("a-compiler-of-nobody",))
    assert build.load() is None
    assert "no C compiler is here" in problem()


def test_what_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "declarations", lambda: "no C")
    assert build.load() is None
    assert "error" in problem()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.FAST_PATH.name, "0")
    assert build.load() is None
    assert env.FAST_PATH.name in problem()


def serve_none(rank: int, num_ranks: int, folder: Path, without: tuple[int, ...]) -> Any:
    if subgroup(range(num_ranks)) is None:
        return None
    load = (lambda: None) if rank in without else build.load
    with emulated(folder, in_step=False), mock.patch("fusco.engines.cuda.fast_path.load", load):
        return run_check(rank, "again", num_ranks, "reference")


@pytest.mark.parametrize("without", [(0, 1, 2), (1,)])
def test_calls_are_the_same_without_it(
    pool: RankPool, without: tuple[int, ...], tmp_path: Path
) -> None:
    """On all ranks, and where others have it."""
    assert not Verdict.of(pool.run(serve_none, 3, tmp_path, without)).failures


def count_references(rank: int, folder: Path) -> None:
    group = subgroup(range(1))
    if group is None:
        return
    inputs = draw(Case(num_tokens=(9,), dtype=torch.bfloat16))
    with emulated(folder, in_step=True), inputs.case.shuffle(group, "reference") as shuffle:
        works = shuffle._engine._works
        heap = works.session.heap
        shared: list[object] = [
            *(torch.strided, torch.bfloat16, torch.float32, torch.int64, torch.Tensor),
            *(Block, Call, BlockPlan, Addresses, fusco.Dispatched),
            *(works, heap.free, heap.chunks, works.session.one, works.session.order),
            *(inputs.x[0], inputs.topk_idx[0], inputs.weights_of(0), inputs.outputs[0]),
        ]
        counts = []
        for num_trips in (100, 50, 50):
            for _ in range(num_trips):
                expect_round_trip(shuffle, inputs, rank)
            gc.collect()
            counts.append([sys.getrefcount(each) for each in shared])
        assert counts[1] == counts[2]


def test_no_references_are_lost(pool: RankPool, tmp_path: Path) -> None:
    pool.run(count_references, tmp_path)


def keep_what_came(rank: int, folder: Path) -> None:
    """Rows return to the heap with the last tensor over them, and are ordinary tensors."""
    group = subgroup(range(1))
    if group is None:
        return
    inputs = draw(Case(num_tokens=(9,), dtype=torch.bfloat16))
    with emulated(folder, in_step=True), inputs.case.shuffle(group, "reference") as shuffle:
        for _ in range(4):
            d = shuffle.dispatch(inputs.x[0], inputs.topk_idx[0], inputs.weights_of(0))
            shuffle.combine(inputs.outputs[0], d)
        assert d.tokens.untyped_storage().nbytes() == d.tokens.nbytes
        free = shuffle._engine._works.session.heap.free
        view = d.tokens[1:].view(-1)
        del d
        before = free.reserve_largest()
        free.release(before)
        del view
        assert free.reserve_largest().size > before.size


def test_rows_are_kept_by_their_views(pool: RankPool, tmp_path: Path) -> None:
    pool.run(keep_what_came, tmp_path)
