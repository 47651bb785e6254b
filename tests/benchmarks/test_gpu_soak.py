"""A soak says when it did less than was asked, or found a difference; on an engine without GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusco.testing.ranks import RankPool

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMAND = [sys.executable, str(BENCHMARKS / "gpu_soak.py"), "--engine", "cpu", "--max-tokens", "8"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=200)


def test_a_whole_soak_is_recorded(tmp_path: Path) -> None:
    output = tmp_path / "soak.jsonl"
    ended = run("--iterations", "4", "--output", str(output), "--commit", "told")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (record,) = map(json.loads, output.read_text().splitlines())
    assert (record["asked"], record["done"], record["ranks"]) == (4, 4, 2)
    assert (record["num_differed"], record["differed"]) == (0, [])
    assert record["commit"] == "told"
    assert {"seconds", "hardware", "torch", "python", "fusco"} <= set(record)


def test_fewer_iterations_than_asked_are_a_failure() -> None:
    ended = run("--iterations", "51", "--seconds", "0")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "only 50 of 51 iterations were done" in ended.stdout


def soak_with_a_wrong_sum(rank: int) -> tuple[int, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import gpu_soak

        right = gpu_soak.expected_sums
        if rank == 1:
            patch.setattr(gpu_soak, "expected_sums", lambda *arguments: right(*arguments) + 1)
        load = gpu_soak.Load(
            engine="cpu", iterations=51, num_ranks=8, max_tokens=8, seconds=200.0, seed=0
        )
        tally = gpu_soak.soak(rank, load)
    return tally.done, tally.differed


def test_a_difference_is_told_and_ends_all_ranks(pool: RankPool) -> None:
    for rank, (done, differed) in enumerate(pool.run(soak_with_a_wrong_sum)):
        assert done == 50
        assert bool(differed) == (rank == 1)
        assert all(": combine: " in text for text in differed)
