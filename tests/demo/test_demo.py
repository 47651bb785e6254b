"""The whole demo, short: what it writes, what it prints, and when it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import zip_longest
from pathlib import Path

import pytest

from fusco.bench import read_jsonl
from fusco.bench.trace import load_trace
from fusco.demo import compare, run_demo, speed
from fusco.demo.train import StepRecord
from fusco.errors import FuscoError, InputError


@pytest.mark.slow
def test_demo_from_beginning_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "HIDDEN_SIZE", 64)
    monkeypatch.setattr(speed, "NUM_ITERATIONS", 1)
    folder = tmp_path / "new" / "folder"
    result = run_demo(folder, num_ranks=2, steps=2, seed=7)

    for name in ("loss.png", "speed.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [(line["run"], line["step"]) for line in lines] == [
        ("ranks", 1),
        ("ranks", 2),
        ("alone", 1),
        ("alone", 2),
    ]
    assert lines[1]["held_out_loss"] == pytest.approx(lines[3]["held_out_loss"], abs=1e-4)
    # Before the first update every byte is about as likely as any other.
    assert lines[0]["loss"] == pytest.approx(math.log(256), abs=0.5)
    assert lines[1]["loss"] < lines[0]["loss"]

    measurements = read_jsonl(folder / "measurements.jsonl")
    assert measurements == result.measurements
    assert {(m.pattern, m.num_nodes) for m in measurements} == {
        ("this model", 1),
        ("uniform", 1),
        ("zipf", 1),
        ("single-node", 2),
        ("imbalanced", 2),
    }
    assert {(m.top_k, m.num_experts, m.num_tokens) for m in measurements} == {(4, 32, 2048)}

    trace = load_trace(folder / "routing.npz")
    assert trace.topk_idx.shape == (4096, 4)
    assert trace.num_experts == 32

    printed, warned = capsys.readouterr()
    assert warned == ""
    for words in ("1/3", "2/3", "3/3", "The losses agree", "step    2", str(folder / "loss.png")):
        assert words in printed


def test_too_many_ranks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_ranks"):
        run_demo(tmp_path / "out", num_ranks=3)
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FuscoError, match=r"matplotlib is not installed.*pip install 'fusco\[plot"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def steps(*losses: float, ties: tuple[int, ...] = ()) -> list[StepRecord]:
    """Records of these losses; in step i of `ties` that many choices are others than usual."""
    return [
        StepRecord(
            step=i,
            loss=loss,
            balance_loss=1.0,
            expert_counts=(10 + number, 10 - number),
            held_out_loss=loss + 1,
            time_ms=1.0,
        )
        for i, (loss, number) in enumerate(zip_longest(losses, ties, fillvalue=0))
    ]


def test_agreement_is_the_largest_difference() -> None:
    agreement = compare.compare(steps(3.0, 2.0, 1.0), steps(3.0, 2.25, 0.875))
    assert (agreement.early, agreement.train, agreement.held_out) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("at", "difference", "agrees"),
    [
        (0, compare.EARLY_TOLERANCE / 2, True),
        (0, compare.EARLY_TOLERANCE * 2, False),
        (compare.NUM_EARLY_STEPS, compare.TOLERANCE / 2, True),
        (compare.NUM_EARLY_STEPS, compare.TOLERANCE * 2, False),
        (compare.NUM_EARLY_STEPS, math.nan, False),
        (0, math.nan, False),
    ],
)
def test_runs_that_differ_too_much_are_reported(at: int, difference: float, agrees: bool) -> None:
    losses = [2.0] * (compare.NUM_EARLY_STEPS + 1)
    other = losses.copy()
    other[at] += difference
    agreement = compare.compare(steps(*losses), steps(*other))
    if agrees:
        agreement.check()
        return
    with pytest.raises(FuscoError, match="differ by up to"):
        agreement.check()


def test_after_a_tie_runs_may_drift() -> None:
    losses = [2.0] * compare.NUM_EARLY_STEPS
    other = [*losses[:5], *(loss + compare.TOLERANCE / 2 for loss in losses[5:])]
    agreement = compare.compare(steps(*losses), steps(*other, ties=(0,) * 5 + (2, 0, 30)))
    assert (agreement.num_alike, agreement.num_ties, agreement.early) == (5, 2, 0.0)
    agreement.check()
    # Not before it, and only where few choices differ.
    other[4] += 2 * compare.EARLY_TOLERANCE
    with pytest.raises(FuscoError, match="first training losses"):
        compare.compare(steps(*losses), steps(*other, ties=(0,) * 5 + (2,))).check()
    many = steps(*losses, ties=(0,) * 5 + (compare.MOST_TIES + 1,))
    with pytest.raises(FuscoError, match=r"after 5 steps .* differ in 9 choices"):
        compare.compare(steps(*losses), many).check()
