"""What `python -m fusco.testing.gpu` runs and records; on an engine that needs no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from fusco import env
from fusco.testing.gpu import runner

ALL = [1, 2, 3, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [(True, size) for size in ALL] + [(False, 2)]),
        (["--ranks", "4,8"], [(True, 4), (True, 8), (False, 4)]),
        (["--copies", "bulk"], [(True, size) for size in ALL]),
        (["--copies", "plain", "--ranks", "3"], [(False, 3)]),
        (["--nodes", "2", "--ranks", "2,4"], [(True, 2), (True, 4)]),
    ],
)
def test_copies_and_ranks(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], expected: list[tuple[bool, int]]
) -> None:
    found = []

    def run(pool: object, name: str, size: int, *_: object) -> list[str]:
        found.append((env.BULK_COPIES.get(), size))
        return []

    for variable in (env.BULK_COPIES, env.TIMEOUT_S):
        monkeypatch.setenv(variable.name, "1")
    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.setattr(runner, "RankPool", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sys, "argv", ["", "--only", "wide-rows", *arguments])
    assert runner.main() == 0
    assert found == expected


def test_a_run_is_recorded(tmp_path: Path) -> None:
    output = tmp_path / "checks.jsonl"
    command = [sys.executable, "-m", "fusco.testing.gpu", "--engine", "cpu", "--ranks", "2"]
    command += ["--only", "tuple-of-four,size-hint", "--output", str(output), "--commit", "told"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 ranks, plain copies, tuple-of-four" in ended.stdout
    (record,) = map(json.loads, output.read_text().splitlines())
    assert (record["checks"], record["passed"], record["failed"]) == (4, 4, [])
    assert record["ranks_by_copies"] == {"bulk": [2], "plain": [2]}
    assert record["commit"] == "told"
    assert {"hardware", "torch", "python", "fusco"} <= set(record)


def test_a_failed_check_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "checks.jsonl"
    for variable in (env.BULK_COPIES, env.TIMEOUT_S):
        monkeypatch.setenv(variable.name, "1")
    monkeypatch.setattr(runner, "_run", lambda pool, name, size, *_: ["no"] * (size == 3))
    monkeypatch.setattr(runner, "RankPool", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sys, "argv", ["", "--only", "wide-rows", "--output", str(output)])
    assert runner.main() == 1
    record = json.loads(output.read_text())
    assert (record["checks"], record["passed"]) == (6, 5)
    assert record["failed"] == ["3 ranks, wide-rows"]
