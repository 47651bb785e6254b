"""The routings that the benchmark generates and reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fusco.bench import BenchConfig
from fusco.bench.patterns import make_routing
from fusco.bench.trace import check_trace, load_trace
from fusco.errors import InputError
from fusco.topology import Topology, contiguous_placement

NUM_RANKS, RANKS_PER_NODE = 6, 2
CONFIG = BenchConfig(num_ranks=NUM_RANKS, num_tokens=400, top_k=5, num_experts=48)


def config_of(pattern: str, **changes: int) -> BenchConfig:
    return BenchConfig(**{**vars(CONFIG), "pattern": pattern, **changes})


def topology_of(rank: int, ranks_per_node: int = RANKS_PER_NODE) -> Topology:
    return Topology(
        rank=rank,
        node_of_rank=tuple(r // ranks_per_node for r in range(NUM_RANKS)),
        rank_of_expert=contiguous_placement(CONFIG.num_experts, NUM_RANKS),
    )


def nodes_of(topk_idx: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The node of each chosen expert."""
    tables = topology.tensors("cpu")
    return tables.node_of_rank[tables.rank_of_expert[topk_idx]]


@pytest.mark.parametrize("pattern", ["uniform", "zipf", "single-node", "imbalanced"])
def test_choices_are_distinct_experts_and_weights_sum_to_1(pattern: str) -> None:
    routing = make_routing(config_of(pattern), topology_of(1), 0)
    idx, weights = routing.topk_idx, routing.topk_weights
    assert idx.shape == weights.shape == (400, 5)
    assert (idx.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert idx.min() >= 0
    assert idx.max() < 48
    assert (idx.sort(dim=1).values.diff(dim=1) > 0).all()
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(400))


@pytest.mark.parametrize("pattern", ["uniform", "zipf", "single-node", "imbalanced"])
def test_a_routing_is_a_function_of_seed_rank_and_iteration(pattern: str) -> None:
    def drawn(seed: int, rank: int, iteration: int) -> torch.Tensor:
        return make_routing(config_of(pattern, seed=seed), topology_of(rank), iteration).topk_idx

    first = drawn(1, 2, 3)
    assert torch.equal(first, drawn(1, 2, 3))
    for other in (drawn(2, 2, 3), drawn(1, 4, 3), drawn(1, 2, 4)):
        assert not torch.equal(first, other)


def test_uniform_is_even_and_zipf_is_not() -> None:
    def shares(pattern: str) -> torch.Tensor:
        counts = torch.zeros(48)
        for rank in range(NUM_RANKS):
            idx = make_routing(config_of(pattern), topology_of(rank), 0).topk_idx
            counts += torch.bincount(idx.flatten(), minlength=48)
        return counts / counts.mean()

    assert shares("uniform").max() < 1.4
    assert shares("zipf").max() > 4


def test_single_node_keeps_a_token_on_one_node_and_uses_all() -> None:
    topology = topology_of(3)
    nodes = nodes_of(make_routing(config_of("single-node"), topology, 0).topk_idx, topology)
    assert (nodes == nodes[:, :1]).all()
    share = torch.bincount(nodes[:, 0], minlength=3) / 400
    assert share.min() > 0.25


def test_imbalanced_sends_every_second_rank_away() -> None:
    for rank in range(NUM_RANKS):
        topology = topology_of(rank)
        idx = make_routing(config_of("imbalanced"), topology, 0).topk_idx
        away = nodes_of(idx, topology) != topology.node
        assert away.all() if rank % 2 else not away.any()


@pytest.mark.parametrize(
    ("pattern", "ranks_per_node", "top_k"),
    [("uniform", 2, 49), ("single-node", 2, 17), ("imbalanced", 2, 17), ("imbalanced", 6, 1)],
)
def test_too_few_experts_is_an_error_on_every_rank(
    pattern: str, ranks_per_node: int, top_k: int
) -> None:
    config = config_of(pattern, top_k=top_k)
    for rank in range(NUM_RANKS):
        with pytest.raises(InputError, match="bench: top_k"):
            make_routing(config, topology_of(rank, ranks_per_node), 0)


def write_trace(path: Path, **changes: object) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        "topk_idx": rng.integers(48, size=(3, 1000, 5)).astype(np.uint8),
        "topk_weights": rng.random((3, 1000, 5)).astype(np.float16),
        "layers": np.array([0, 7, 9]),
        "num_experts": np.array(48),
    }
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return path


def test_a_trace_gives_each_rank_its_tokens_in_turn(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.npz")
    trace = load_trace(path)
    assert (trace.layer, trace.top_k, trace.num_experts) == (7, 5, 48)
    with np.load(path) as file:
        recorded_idx, recorded_weights = file["topk_idx"][1], file["topk_weights"][1]
    config = BenchConfig(**{**vars(CONFIG), "pattern": "trace", "trace": path})
    for rank, iteration in ((0, 0), (1, 0), (2, 0), (1, 5)):
        routing = make_routing(config, topology_of(rank), iteration, trace)
        at = (np.arange(400) + (iteration * NUM_RANKS + rank) * 400) % 1000
        np.testing.assert_array_equal(routing.topk_idx.numpy(), recorded_idx[at])
        np.testing.assert_array_equal(routing.topk_weights.numpy(), recorded_weights[at])
        assert (routing.topk_idx.dtype, routing.topk_weights.dtype) == (torch.int64, torch.float32)


def test_a_trace_of_other_experts_is_refused(tmp_path: Path) -> None:
    trace = load_trace(write_trace(tmp_path / "trace.npz"))
    check_trace(trace, num_experts=48, top_k=5)
    with pytest.raises(InputError, match="num_experts: got 64, expected 48"):
        check_trace(trace, num_experts=64, top_k=5)
    with pytest.raises(InputError, match="top_k: got 8, expected 5"):
        check_trace(trace, num_experts=48, top_k=8)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"topk_idx": None}, "topk_idx is not a file"),
        ({"topk_weights": np.zeros((3, 1000, 4), np.float16)}, "are .1000, 5. and .1000, 4."),
        ({"num_experts": np.array([1, 2])}, "only 0-dimensional|only length-1"),
        ({"layers": np.array([object()])}, "allow_pickle"),
    ],
)
def test_what_is_no_trace_is_refused(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        load_trace(write_trace(tmp_path / "trace.npz", **changes))


def test_a_missing_or_other_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which is not there"):
        load_trace(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"which is no \.npz file"):
        load_trace(tmp_path / "text.npz")
