"""A Shuffle that cannot be made says why, on every rank, and the next one can."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fusco
from fusco import engines
from fusco.engines import probe
from fusco.engines.cpu import session
from fusco.testing.cases import Case, draw, expect_round_trip
from fusco.testing.ranks import RankPool, subgroup

CASE = Case(num_tokens=(5, 8, 3), hidden_size=16, top_k=2, num_experts=6)
MEMBERS = (1, 2, 3)
PROMPT_S = 20.0
DISAGREE = fusco.DisagreementError

OTHER_ENGINE = "the engine that the other ranks do not use"
CONSTRUCTION: Mapping[str, tuple[dict[str, Any], type[fusco.FuscoError], str]] = {
    "experts-do-not-divide": ({"num_experts": 7}, fusco.InputError, "num_experts"),
    "no-experts": ({"num_experts": 0}, fusco.InputError, "num_experts"),
    "experts-are-a-word": ({"num_experts": "six"}, fusco.InputError, "num_experts"),
    "experts-are-a-float": ({"num_experts": np.float64(6)}, fusco.InputError, "num_experts"),
    "experts-are-a-switch": ({"num_experts": np.bool_(True)}, fusco.InputError, "num_experts"),
    "no-experts-in-numpy": ({"num_experts": np.int64(0)}, fusco.InputError, "num_experts: got 0"),
    "ablation-is-a-word": (
        {"ablation": "fusion"},
        fusco.InputError,
        "fusco.Ablation(fusion=False)",
    ),
    "ablation-of-numpy": (
        {"ablation": fusco.Ablation(fusion=np.bool_(True))},  # type: ignore[arg-type]
        fusco.InputError,
        "a fusco.Ablation of True and False",
    ),
    "placement-without-values": (
        {"placement": torch.zeros(6, dtype=torch.int64, device="meta")},
        fusco.InputError,
        "placement",
    ),
    "ablation-is-no": ({"ablation": False}, fusco.InputError, "ablation: got False"),
    "no-hidden": ({"hidden_size": 0}, fusco.InputError, "hidden_size"),
    "no-top-k": ({"top_k": 0}, fusco.InputError, "top_k"),
    "negative-max-tokens": ({"max_tokens": -1}, fusco.InputError, "max_tokens"),
    "dtype-is-a-word": ({"dtype": "bfloat16"}, fusco.InputError, "dtype"),
    "unknown-engine": ({"engine": "warp"}, fusco.InputError, "engine"),
    "placement-is-short": ({"placement": (0, 1, 2)}, fusco.InputError, "placement"),
    "placement-is-words": ({"placement": tuple("abcdef")}, fusco.InputError, "placement"),
    "placement-is-a-number": ({"placement": 3}, fusco.InputError, "placement: got int, expected"),
    "placement-is-switches": ({"placement": (True,) * 6}, fusco.InputError, "rank True"),
    "placement-is-an-array-of-floats": (
        {"placement": np.zeros(6)},
        fusco.InputError,
        "placement: got rank 0.0, expected",
    ),
    "placement-of-no-rank": ({"placement": (0, 1, 2, 3, 0, 1)}, fusco.InputError, "placement"),
    "no-ranks-on-a-node": ({"ranks_per_node": 0}, fusco.InputError, "ranks_per_node"),
    "no-alignment": ({"expert_alignment": 0}, fusco.InputError, "expert_alignment"),
    "no-time": ({"timeout_s": 0.0}, fusco.InputError, "timeout_s"),
    "endless-time": ({"timeout_s": float("inf")}, fusco.InputError, "timeout_s: got inf"),
    "centuries": ({"timeout_s": 1e12}, fusco.InputError, "timeout_s: got 1000000000000.0"),
    "time-in-words": ({"timeout_s": "9"}, fusco.InputError, "timeout_s: got '9'"),
    "other-experts-here": ({"num_experts": 12}, DISAGREE, "num_experts"),
    "other-hidden-here": ({"hidden_size": 17}, DISAGREE, "hidden_size"),
    "other-top-k-here": ({"top_k": 3}, DISAGREE, "top_k"),
    "other-dtype-here": ({"dtype": torch.float64}, DISAGREE, "dtype"),
    "other-alignment-here": ({"expert_alignment": 8}, DISAGREE, "expert_alignment"),
    "other-placement-here": ({"placement": (0, 1, 2, 0, 1, 2)}, DISAGREE, "placement"),
    "other-nodes-here": ({"ranks_per_node": 1}, DISAGREE, "node"),
    "other-engine-here": ({"engine": OTHER_ENGINE}, DISAGREE, "engine"),
    "other-ablation-here": (
        {"ablation": fusco.Ablation(deduplicate=False)},
        DISAGREE,
        "ablation",
    ),
}


def construct(rank: int, name: str, engine: str) -> tuple[str, ...]:
    """The type and text of this rank's error, and whether it was late."""
    group = subgroup(MEMBERS)
    if group is None:
        return ()
    rank = dist.get_rank(group)
    changes = dict(CONSTRUCTION[name][0] if rank == 1 else {})
    if changes.get("engine") == OTHER_ENGINE:
        changes["engine"] = "cpu" if engine == "reference" else "reference"
    started = time.monotonic()
    try:
        CASE.shuffle(group, engine, **changes).close()
        raised = ("nothing", "")
    except Exception as error:  # noqa: BLE001 (which one it is, is what the test is about)
        raised = (type(error).__name__, str(error))
    late = time.monotonic() - started > PROMPT_S
    with CASE.shuffle(group, engine) as shuffle:
        expect_round_trip(shuffle, draw(CASE), rank)
    return (*raised, "late" if late else "")


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_bad_construction(pool: RankPool, host_engine: str, name: str) -> None:
    _, error, names = CONSTRUCTION[name]
    outcomes = pool.run(construct, name, host_engine)
    for rank, member in enumerate(MEMBERS):
        raised, text, late = outcomes[member]
        assert raised == error.__name__, f"rank {rank}: {raised}: {text}"
        assert names in text, f"rank {rank}: {text}"
        assert not late, f"rank {rank}: not prompt"


PLACEMENT = (0, 2, 1, 1, 0, 2)
ACCEPTED: Mapping[str, dict[str, Any]] = {
    "integers-of-numpy": {
        name: np.int32(value)
        for name, value in (
            ("num_experts", 6),
            ("hidden_size", 16),
            ("top_k", 2),
            ("max_tokens", 8),
        )
    },
    "placement-is-an-array": {"placement": np.array(PLACEMENT)},
    "placement-is-a-tensor": {"placement": torch.tensor(PLACEMENT)},
    "placement-is-a-list-of-numpy": {"placement": list(np.array(PLACEMENT))},
}


def accept(rank: int, name: str, engine: str) -> None:
    """One rank has the arguments in another form than the others."""
    group = subgroup(MEMBERS)
    if group is None:
        return
    rank, changes = dist.get_rank(group), ACCEPTED[name]
    case = replace(CASE, placement=PLACEMENT if "placement" in changes else None)
    with case.shuffle(group, engine, **(changes if rank == 1 else {})) as shuffle:
        expect_round_trip(shuffle, draw(case), rank)


@pytest.mark.parametrize("name", ACCEPTED)
def test_other_forms(pool: RankPool, host_engine: str, name: str) -> None:
    pool.run(accept, name, host_engine)


def with_another_default_dtype(rank: int, engine: str) -> None:
    """One rank makes tensors of another dtype by default than the others."""
    group = subgroup(MEMBERS)
    if group is None:
        return
    rank = dist.get_rank(group)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if rank == 1 else before)
    try:
        shuffle = CASE.shuffle(group, engine)
    finally:
        torch.set_default_dtype(before)
    with shuffle:
        expect_round_trip(shuffle, draw(CASE), rank)


def test_default_dtype(pool: RankPool, host_engine: str) -> None:
    pool.run(with_another_default_dtype, host_engine)


def on_few_ranks(rank: int, engine: str) -> None:
    """A job's settings where there are fewer ranks and experts than they were made for."""
    group = subgroup(MEMBERS)
    if group is None:
        return
    case = replace(CASE, ranks_per_node=8, top_k=7, routing="repeated")
    with case.shuffle(group, engine) as shuffle:
        assert shuffle.topology.num_nodes == 1
        expect_round_trip(shuffle, draw(case), dist.get_rank(group))


def test_few_ranks_and_experts(pool: RankPool, host_engine: str) -> None:
    pool.run(on_few_ranks, host_engine)


def no_group(rank: int, engine: str) -> list[str]:
    """The errors of what is no group, which can only be told to this rank."""
    others = dist.new_group([0, 1])
    errors = []
    for group in ("world", others if rank > 1 else 7):
        try:
            CASE.shuffle(group, engine)  # type: ignore[arg-type]
        except fusco.InputError as error:
            errors.append(str(error))
    return errors


def test_no_group(pool: RankPool, host_engine: str) -> None:
    for errors in pool.run(no_group, host_engine):
        assert len(errors) == 2
        assert all("group" in text for text in errors)


def test_an_allocator_without_symmetric_memory_has_no_cuda_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    (found,) = [each for each in probe() if each.name == "cuda"]
    assert not found.available
    assert "PYTORCH_ALLOC_CONF" in found.reason


@pytest.mark.parametrize(
    ("version", "cuda", "is_old"),
    [
        ("2.11.0+cu130", "13.0", False),
        ("2.11.0a0+git1234567", "13.1", False),
        ("3.0.0", "14.0", False),
        ("2.9.1+cu130", "13.0", True),
        ("2.11.0+cu128", "12.8", True),
        ("2.11.0+rocm7.0", None, True),
    ],
)
def test_an_old_torch_has_no_cuda_engine(
    monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, is_old: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(engines, "missing_cuda_package", lambda: "")
    (found,) = [each for each in probe() if each.name == "cuda"]
    assert found.available != is_old
    expected = f"needs torch 2.11 or later for CUDA 13 or later, and this is {version} for "
    assert is_old == found.reason.startswith(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_without_a_gpu_the_version_does_not_matter() -> None:
    (found,) = [each for each in probe() if each.name == "cuda"]
    assert found.reason == "needs a CUDA device, and torch finds none"


def test_an_unknown_processor_has_no_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    (found,) = [each for each in probe() if each.name == "cpu"]
    assert not found.available
    assert "abacus" in found.reason


def make_without(rank: int, what: str) -> None:
    """A rank cannot make what all need for engine cpu, and then it can."""
    group = subgroup(MEMBERS)
    if group is None:
        return

    fail = mock.Mock(side_effect=OSError("there is none"))
    fail.open = fail
    begin = time.monotonic()
    without = mock.patch.object(session, what, fail) if rank == MEMBERS[1] else nullcontext()
    # Ranks have numbers of their own in a group.
    expected = pytest.raises(fusco.EngineUnavailableError, match="rank 1: there is none")
    with without, expected:
        CASE.shuffle(group, "cpu")
    assert time.monotonic() - begin < PROMPT_S
    with CASE.shuffle(group, "cpu") as shuffle:
        expect_round_trip(shuffle, draw(CASE), group.rank())


@pytest.mark.parametrize("what", ["_warm_up_once", "Window", "Control", "Mapping"])
def test_what_a_rank_cannot_make_is_missed_by_all(pool: RankPool, what: str) -> None:
    pool.run(make_without, what)
