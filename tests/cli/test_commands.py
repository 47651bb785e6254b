"""The command line as a user meets it: outputs, exit codes, and short errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fusco
from fusco import engines, env
from fusco.bench import BenchConfig
from fusco.cli import app
from fusco.engines import EngineProbe
from fusco.engines.cuda import peers
from fusco.engines.cuda.peers import Link

SMALL = (
    *("bench", "--engine", "reference", "--num-ranks", "2", "--num-tokens", "8"),
    *("--hidden-size", "16", "--num-experts", "4", "--top-k", "2", "--iterations", "2"),
)


def fusco_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fusco", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks under torchrun."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "fusco", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
    )


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "bench", "selftest", "doctor", "warmup"):
        assert command in result.output


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"fusco {fusco.__version__}\n")


def test_demo_tells_its_length() -> None:
    from fusco.demo.train import DEFAULT_STEPS

    result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"})
    assert f"default: ({DEFAULT_STEPS}; " in result.output


def test_bench_prints_the_table_and_writes_records(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    result = fusco_command(*SMALL, "--output", str(path))
    assert result.returncode == 0, result.stderr
    assert "gloo-all_to_all" in result.stdout
    assert f"Wrote 9 measurements to {path}" in result.stdout.replace("\n", "")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 9
    assert {(r["engine"], r["op"]) for r in records} == {
        (engine, op)
        for engine in ("reference", "gloo-all_to_all", "gloo-kept")
        for op in ("dispatch", "combine", "total")
    }


def test_bench_runs_under_torchrun() -> None:
    result = launched(*SMALL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 on 1 node") == 1


def test_hosts_have_ranks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = CliRunner().invoke(app, ["bench", "--hosts", "2"])
    assert result.exit_code == 2
    assert "--hosts: got 2 under torchrun" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-ranks 3", "num_experts: got 64 on 3 ranks"),
        ("--num-ranks 0", "num_ranks: got 0"),
        ("--hosts 2 --num-ranks 3", "--num-ranks: got 3 with --hosts 2; give --ranks-per-host"),
        ("--hosts 2 --num-ranks 4", "--num-ranks: got 4 with --hosts 2; give --ranks-per-host"),
        ("--hosts 3", "num_experts: got 64 on 6 ranks"),
        ("--hosts 0", "Invalid value for '--hosts'"),
        ("--ranks-per-host 4", "--ranks-per-host: got 4 without --hosts"),
        ("--nic 1gbit", "--nic: got 1gbit without --hosts"),
        ("--pattern other", "pattern: got 'other'"),
        ("--pattern trace", "trace: got none"),
        ("--pattern trace --trace none.npz", "trace: got none.npz, which is not there"),
        ("--dtype int8", "dtype: got 'int8'"),
        ("--ablation some", "ablation: got 'some'"),
        ("--output /proc/none/records.jsonl", "--output: "),
        ("--compare none.jsonl", "--compare: got none.jsonl, which is not there; write one with"),
        ("--num-sms 24,many", "num_sms: got '24,many'"),
        ("--num-sms 24", "num_sms: got (24,) on 'cpu', expected device 'cuda'"),
        ("--backward", "backward: got True on 'cpu'"),
        ("--device tpu", "device: got 'tpu', expected one of cpu, cuda"),
        ("--num-tokens many", "Invalid value for '--num-tokens'"),
    ],
)
def test_a_users_error_is_short_and_exits_with_2(arguments: str, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments.split()])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) <= 8


def test_a_trace_needs_its_pattern() -> None:
    with pytest.raises(fusco.InputError, match="give --pattern trace"):
        BenchConfig(trace=Path("recorded.npz"))


def test_a_demo_that_can_write_nowhere_says_so() -> None:
    result = CliRunner().invoke(app, ["demo", "--output-dir", "/proc/none"])
    assert result.exit_code == 2
    assert "output_dir: got /proc/none" in result.output
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", ["--device cuda", "--engine cuda", "--engine cuda --graph"])
def test_without_a_gpu_the_error_says_so(arguments: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments.split()])
    assert result.exit_code == 2
    assert "device: got 'cuda', expected 'cpu', as torch finds no CUDA device" in result.output
    assert len(result.output.splitlines()) == 1


def test_an_error_on_the_ranks_is_as_short() -> None:
    result = fusco_command(*SMALL, "--pattern", "imbalanced", "--ranks-per-node", "2")
    assert result.returncode == 2, result.stderr
    assert "top_k: got 2 with 4 experts on 1 nodes" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_selftest_passes_with_a_line_a_check() -> None:
    from fusco.testing.conformance import CHECKS

    result = fusco_command("selftest", "--num-ranks", "2", "--engine", "reference")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["pass"] * len(CHECKS) + [str(len(CHECKS))]
    assert lines[-1] == f"{len(CHECKS)} of {len(CHECKS)} checks passed"


FAILING = """
from dataclasses import replace
from fusco.testing import conformance
from fusco.testing.check import NotApplicable
import torch.distributed as dist

def wrong(group, engine):
    if dist.get_rank(group) == 1:
        raise AssertionError("row 3 is wrong")

def elsewhere(group, engine):
    raise NotApplicable("of other engines")

first = conformance.CHECKS[0]
conformance.CHECKS = (
    first, replace(first, name="wrong", fn=wrong), replace(first, name="elsewhere", fn=elsewhere)
)
"""


def test_selftest_fails_with_1_and_says_why(tmp_path: Path) -> None:
    # Runs in each process before anything else: the workers import it too.
    (tmp_path / "sitecustomize.py").write_text("import failing_checks")
    (tmp_path / "failing_checks.py").write_text(FAILING)
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    result = fusco_command("selftest", "--num-ranks", "2", "--engine", "reference", PYTHONPATH=path)
    assert result.returncode == 1, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["pass", "FAIL", "rank", "skip", "of", "1"]
    assert "rank 1: AssertionError: row 3 is wrong" in result.stdout
    assert "1 of 2 checks passed, 1 skipped" in result.stdout


def test_selftest_runs_under_torchrun() -> None:
    from fusco.testing.conformance import CHECKS

    result = launched("selftest", "--engine", "reference")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("pass  ") == len(CHECKS)


def test_selftest_refuses_an_engine_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["selftest", "--engine", "other"])
    assert result.exit_code == 2
    assert (
        "selftest: engine: got 'other', expected all, cuda, cpu, two_level, reference"
        in result.output
    )


def test_doctor_shows_the_same_in_both_forms() -> None:
    facts = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert {engine["name"] for engine in facts["engines"]} == {
        "cuda",
        "cpu",
        "two_level",
        "reference",
    }
    assert facts["healthy"] is True
    assert facts["fusco"] == fusco.__version__
    table = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"}).output
    for found in (facts["python"], facts["packages"]["torch"], facts["hardware"]["cpu"]):
        assert found in table
    for engine in facts["engines"]:
        assert engine["reason"] in table
    for variable in facts["environment"]:
        assert variable["name"] in table
    assert "NUMBA_CACHE_DIR" in table


def test_doctor_shows_links(monkeypatch: pytest.MonkeyPatch) -> None:
    links = [
        {"source": 0, "target": 1, "problem": "", "write_gbps": 391.6, "read_gbps": 300.0},
        {"source": 1, "target": 0, "problem": "no [peer] access", "write_gbps": 0, "read_gbps": 0},
    ]
    monkeypatch.setattr(sys.modules["fusco.cli.doctor"], "_links", lambda: links)
    table = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"}).output
    assert "cuda:0 > cuda:1" in table
    assert "writes 392, reads 300 GB/s" in table
    assert "no [peer] access" in table


def test_doctor_shows_links_that_cannot_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = EngineProbe(name="cuda", available=True, reason="")

    def try_link(source: int, target: int) -> Link:
        if source == 0:
            raise torch.OutOfMemoryError("no [64] MiB")
        return Link(source=source, target=target, write_gbps=391.6, read_gbps=300.0)

    monkeypatch.setattr(engines, "probe", lambda: (cuda,))
    monkeypatch.setattr(peers, "try_link", try_link)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sys.modules["fusco.cli.doctor"], "_devices", lambda: [])
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200", env.FAST_PATH.name: "0"})
    assert result.exit_code == 0, result.exception
    assert f"slower: {env.FAST_PATH.name} is 0" in result.output
    assert "cannot be tried: no [64] MiB" in result.output
    assert "writes 392, reads 300 GB/s" in result.output


def test_doctor_finds_a_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSCO_TIMEOUT_S", "[soon]")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    by_name = {variable["name"]: variable for variable in json.loads(result.output)["environment"]}
    assert "got '[soon]'" in by_name["FUSCO_TIMEOUT_S"]["problem"]
    table = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert table.exit_code == 1
    assert "got '[soon]'" in table.output


def test_doctor_finds_a_variable_that_nothing_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSCO_TIMEOUT", "3")
    monkeypatch.setenv("FUSCO_XYZ", "3")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    by_name = {variable["name"]: variable for variable in json.loads(result.output)["environment"]}
    assert by_name["FUSCO_TIMEOUT"]["problem"].endswith("is FUSCO_TIMEOUT_S meant?")
    assert by_name["FUSCO_XYZ"]["problem"].endswith("unset it")


def test_a_comparison_with_nothing_alike_fails(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    assert fusco_command(*SMALL, "--output", str(record)).returncode == 0
    result = fusco_command(*SMALL, "--top-k", "1", "--compare", str(record))
    assert result.returncode == 1, result.stderr
    assert "has no measurement of what was measured here" in result.stderr
