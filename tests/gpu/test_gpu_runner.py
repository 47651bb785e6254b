"""What `python -m fusco.testing.gpu` runs and records; on an engine that needs no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fusco import env
from fusco.testing.check import Verdict
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

    def run(pool: object, name: str, size: int, *_: object) -> Verdict:
        found.append((env.BULK_COPIES.get(), size))
        return Verdict()

    for variable in (env.BULK_COPIES, env.TIMEOUT_S):
        monkeypatch.setenv(variable.name, "1")
    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.setattr(runner, "RankPool", lambda *_, **__: nullcontext())
    monkeypatch.setattr(runner, "_has_gpus", lambda engine: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["", "--only", "wide-rows", *arguments])
    assert runner.main() == 0
    assert found == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--nodes", "2"]])
def test_without_gpus_nothing_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runner.main()
    assert "no CUDA device" in capsys.readouterr().err


def test_a_run_is_recorded(tmp_path: Path) -> None:
    output = tmp_path / "checks.jsonl"
    command = [sys.executable, "-m", "fusco.testing.gpu", "--engine", "cpu", "--ranks", "2"]
    only = "tuple-of-four,size-hint,nccl-group"
    command += ["--only", only, "--output", str(output), "--commit", "told"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 ranks, plain copies, tuple-of-four" in ended.stdout
    lines = ended.stdout.splitlines()
    assert sorted(line.split()[0] for line in lines if " s  " in line) == 4 * ["pass"] + 2 * [
        "skip"
    ]
    assert "      needs a GPU a rank, and an engine for them" in lines
    assert lines[-1] == "4 of 4 checks passed, 2 skipped"
    (record,) = map(json.loads, output.read_text().splitlines())
    assert (record["checks"], record["passed"], record["failed"]) == (4, 4, [])
    assert record["skipped"] == ["2 ranks, nccl-group", "2 ranks, plain copies, nccl-group"]
    assert record["ranks_by_copies"] == {"bulk": [2], "plain": [2]}
    assert record["commit"] == "told"
    assert {"hardware", "torch", "python", "fusco"} <= set(record)


def test_failed_and_skipped_checks_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "checks.jsonl"
    for variable in (env.BULK_COPIES, env.TIMEOUT_S):
        monkeypatch.setenv(variable.name, "1")

    def run(pool: object, name: str, size: int, *_: object) -> Verdict:
        return Verdict(failures=["no"] * (size == 3), why_skipped="alone" * (size == 1))

    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.setattr(runner, "RankPool", lambda *_, **__: nullcontext())
    monkeypatch.setattr(runner, "_has_gpus", lambda engine: True)
    monkeypatch.setattr(sys, "argv", ["", "--only", "wide-rows", "--output", str(output)])
    assert runner.main() == 1
    record = json.loads(output.read_text())
    assert (record["checks"], record["passed"]) == (5, 4)
    assert record["failed"] == ["3 ranks, wide-rows"]
    assert record["skipped"] == ["1 ranks, wide-rows"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--only wide-rows,narrower", "no check of 'cuda' has 'narrower' in its name: float32, "),
        ("--nodes 2 --ranks 2,4", "4 ranks on 2 nodes need 2 GPUs"),
    ],
)
def test_what_cannot_be_run_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    says: str,
) -> None:
    for variable in (env.BULK_COPIES, env.TIMEOUT_S):
        monkeypatch.setenv(variable.name, "1")
    monkeypatch.setattr(runner, "_has_gpus", lambda engine: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        runner.main()
    assert says in capsys.readouterr().err


def test_a_run_of_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (env.BULK_COPIES, env.TIMEOUT_S):
        monkeypatch.setenv(variable.name, "1")
    monkeypatch.setattr(runner, "_run", lambda *_: Verdict(why_skipped="alone"))
    monkeypatch.setattr(runner, "RankPool", lambda *_, **__: nullcontext())
    monkeypatch.setattr(runner, "_has_gpus", lambda engine: True)
    monkeypatch.setattr(sys, "argv", ["", "--only", "wide-rows"])
    assert runner.main() == 1
