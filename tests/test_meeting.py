"""Which engine a group gets: the fastest that all of its ranks can use, and a reason if none."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

import fusco
from fusco import env, meeting
from fusco.devices import Reach, why_not_joined
from fusco.testing.ranks import RankPool, subgroup

MEMBERS = (0, 1, 2)
JOINED = tuple(Reach(device=f"gpu-{rank}", backend="nccl") for rank in MEMBERS)
APART = (*JOINED[:2], Reach(device="gpu-2", apart=["gpu-9", "gpu-0"], backend="nccl"))
TWO_APART = (JOINED[0], Reach(device="gpu-1", apart=["gpu-0"], backend="nccl"), JOINED[2])
NO_COMPILER = (JOINED[0], replace(JOINED[1], no_kernels="needs cuda.core"), JOINED[2])
NO_WINDOWS = (JOINED[0], replace(JOINED[1], no_windows="needs memory"), JOINED[2])
ONE_NO_WINDOWS = (*JOINED[:2], replace(JOINED[2], no_windows="needs memory"))
NO_GPU = (JOINED[0], Reach(problem="needs a CUDA device", backend="nccl"), JOINED[2])
GLOO = tuple(Reach(device=f"gpu-{rank}", backend="gloo") for rank in MEMBERS)


def choose(
    rank: int,
    reaches: tuple[Reach, ...],
    asked: str,
    settings: dict[str, object],
    sends: tuple[str, ...],
    nodes: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> str:
    """The engine that ranks with such GPUs get, or why they get none."""
    group = subgroup(MEMBERS)
    if group is None:
        return ""
    told = {env.NODE_ID.name: nodes[rank]} if nodes else {}
    with (
        mock.patch.dict(os.environ, told),
        mock.patch.object(meeting, "_reach", return_value=reaches[rank]),
        mock.patch.object(meeting, "group_device_types", return_value=sends),
    ):
        try:
            return meeting.meet("Shuffle", group, settings, engine=asked, without=without).engine
        except fusco.EngineUnavailableError as error:
            return str(error)


BOTH = ("cpu", "cuda")
CASES = {
    "joined": (JOINED, "auto", {}, BOTH, "cuda"),
    "joined-nccl-only": (JOINED, "auto", {}, ("cuda",), "cuda"),
    "apart": (APART, "auto", {}, BOTH, "cpu"),
    "one-without": (NO_GPU, "auto", {}, BOTH, "cpu"),
    "cuda-tensors-over-gloo": (GLOO, "auto", {}, BOTH, "cpu"),
    "cuda-tensors-over-gloo-asked": (GLOO, "cuda", {}, BOTH, "cuda"),
    "ablation": (JOINED, "auto", {"ablation": {"fusion": False}}, BOTH, "cpu"),
    "apart-asked": (APART, "cuda", {}, BOTH, "rank 2 has no access to the memory of rank 0's"),
    "one-without-asked": (NO_GPU, "cuda", {}, BOTH, "rank 1 needs a CUDA device"),
    "ablation-asked": (JOINED, "cuda", {"ablation": {"fusion": False}}, BOTH, "switched off"),
    "apart-nccl-only": (APART, "auto", {}, ("cuda",), "cpu:gloo,cuda:nccl"),
    "no-compiler": (NO_COMPILER, "auto", {}, BOTH, "cpu"),
    "no-compiler-asked": (NO_COMPILER, "cuda", {}, BOTH, "rank 1 needs cuda.core"),
    "no-windows": (NO_WINDOWS, "auto", {}, BOTH, "cpu"),
    "top-32": (JOINED, "auto", {"top_k": 32}, BOTH, "cuda"),
    "top-33": (JOINED, "auto", {"top_k": 33}, BOTH, "cpu"),
    "top-33-asked": (JOINED, "cuda", {"top_k": 33}, BOTH, "it serves top_k up to 32, not 33"),
    "top-33-nccl-only": (JOINED, "auto", {"top_k": 33}, ("cuda",), "up to 32, not 33; for other"),
    "many-experts": (JOINED, "auto", {"num_experts": 65536}, BOTH, "cpu"),
    "no-windows-asked": (NO_WINDOWS, "cuda", {}, BOTH, "rank 1 needs memory"),
}
NODES = ("0", "0", "1")
BETWEEN_NODES = {
    "joined": (JOINED, "auto", {}, BOTH, "two_level"),
    "joined-nccl-only": (JOINED, "auto", {}, ("cuda",), "two_level"),
    "no-compiler": (NO_COMPILER, "auto", {}, BOTH, "two_level"),
    "apart": (APART, "auto", {}, BOTH, "two_level"),
    "no-windows-in-a-node": (NO_WINDOWS, "two_level", {}, BOTH, "rank 1 needs memory"),
    "no-windows-of-one-alone": (ONE_NO_WINDOWS, "auto", {}, BOTH, "two_level"),
    "apart-in-a-node": (TWO_APART, "two_level", {}, BOTH, "rank 1 has no access to the memory"),
    "apart-in-a-node-nccl-only": (TWO_APART, "auto", {}, ("cuda",), "rank 1 has no access"),
    "ablation": (JOINED, "auto", {"ablation": {"fusion": False}}, BOTH, "two_level"),
}


@pytest.mark.parametrize("name", CASES)
def test_choice(pool: RankPool, name: str) -> None:
    reaches, asked, settings, sends, want = CASES[name]
    got = pool.run(choose, reaches, asked, settings, sends)[: len(MEMBERS)]
    assert len(set(got)) == 1, got
    assert got[0] == want or (want not in ("cpu", "cuda") and want in got[0])


@pytest.mark.parametrize("name", BETWEEN_NODES)
def test_choice_between_nodes(pool: RankPool, name: str) -> None:
    reaches, asked, settings, sends, want = BETWEEN_NODES[name]
    got = pool.run(choose, reaches, asked, settings, sends, NODES)[: len(MEMBERS)]
    assert len(set(got)) == 1, got
    assert want in got[0]


@pytest.mark.parametrize("nodes", [(), NODES])
def test_no_engine_for_gpus_exchanges(pool: RankPool, nodes: tuple[str, ...]) -> None:
    got = pool.run(choose, JOINED, "auto", {}, ("cuda",), nodes, ("cuda",))[: len(MEMBERS)]
    assert all(" serve Shuffle; for other" in text or "serves Shuffle; " in text for text in got)


def test_many_ranks_get_another_engine() -> None:
    def why_not(num_ranks: int) -> str:
        greetings = [{"settings": {}}] * num_ranks
        return meeting._why_no_cuda("Shuffle", greetings, JOINED[:1] * num_ranks, True, ())

    assert why_not(32) == ""
    assert why_not(33) == "it serves num_ranks up to 32, not 33"


def test_ranks_that_share_a_gpu_are_joined() -> None:
    assert why_not_joined({0: JOINED[0], 1: JOINED[0]}) == ""


def ask_for_cuda(rank: int) -> str:
    try:
        fusco.Shuffle(num_experts=8, hidden_size=16, top_k=1, max_tokens=4, engine="cuda")
    except fusco.EngineUnavailableError as error:
        return str(error)
    return ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_without_gpus_every_rank_says_so(pool: RankPool) -> None:
    for text in pool.run(ask_for_cuda):
        assert "engine 'cuda' cannot serve these ranks: rank 0 needs a CUDA device" in text


@pytest.mark.parametrize("asked", ["cuda", "auto"])
def test_ranks_tell_that_their_torch_is_too_old(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(meeting, "cuda_backend", lambda group: "nccl")
    monkeypatch.setattr(meeting, "find_reach", lambda group, why: Reach(no_kernels=why))
    reach = meeting._reach(mock.Mock(), asked)
    assert "needs torch 2.11 or later" in reach.no_kernels


def exchange_by_cuda(rank: int) -> str:
    nothing = torch.zeros(0, dtype=torch.uint8)
    none = [fusco.Segments(offset=torch.zeros(0), size=torch.zeros(0))] * 8
    try:
        fusco.exchange(nothing, none, nothing, none, engine="cuda")
    except fusco.EngineUnavailableError as error:
        return str(error)
    return ""


def test_exchange_has_no_cuda_engine(pool: RankPool) -> None:
    assert all("does not serve exchange" in text for text in pool.run(exchange_by_cuda))
