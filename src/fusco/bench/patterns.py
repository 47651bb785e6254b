"""Routings to measure with: who chooses which experts. The same for a seed on every machine.

Suffixes: T tokens of a rank, K choices of a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusco.bench.config import BenchConfig
from fusco.bench.trace import Trace
from fusco.errors import input_error
from fusco.topology import Topology

ZIPF_EXPONENT = 1.0


@dataclass(frozen=True, kw_only=True)
class TokenRouting:
    """The routing of one rank's tokens: `topk_idx` int64 and `topk_weights` fp32, both [T, K]."""

    topk_idx: Tensor
    topk_weights: Tensor

    def to(self, device: torch.device) -> TokenRouting:
        """The same on a device."""
        return TokenRouting(
            topk_idx=self.topk_idx.to(device), topk_weights=self.topk_weights.to(device)
        )


@dataclass(frozen=True, kw_only=True)
class RoutingSet:
    """Routings from elsewhere, measured in rotation.

    Attributes:
        topk_idx: integers `[routings, ranks, T, K]`, -1 for no expert.
        topk_weights: floats of that shape.
    """

    topk_idx: NDArray[np.integer]
    topk_weights: NDArray[np.floating]

    def __len__(self) -> int:
        return len(self.topk_idx)

    def of(self, routing: int, rank: int) -> TokenRouting:
        """One of the routings, as one rank has it."""
        return TokenRouting(
            topk_idx=torch.from_numpy(self.topk_idx[routing, rank].astype(np.int64)),
            topk_weights=torch.from_numpy(self.topk_weights[routing, rank].astype(np.float32)),
        )

    def check(self, config: BenchConfig) -> None:
        """Raises InputError unless this fits `config`."""
        expected = (config.num_ranks, config.num_tokens, config.top_k)
        for name, got in (("topk_idx", self.topk_idx), ("topk_weights", self.topk_weights)):
            if got.ndim != 4 or len(got) == 0 or got.shape[1:] != expected:
                raise input_error(
                    "bench",
                    f"routing.{name}",
                    got=f"shape {got.shape}",
                    expected=f"(routings, num_ranks, num_tokens, top_k) = (1 or more, {expected})",
                    remedy="give arrays of that shape, or change the configuration",
                )


def make_routing(
    config: BenchConfig, topology: Topology, iteration: int, trace: Trace | None = None
) -> TokenRouting:
    """The routing of `topology.rank` in one iteration, a function of (seed, rank, iteration).

    - uniform: K distinct experts, all equally likely.
    - zipf: K distinct experts, the i-th most popular with weight 1/i; which expert is how popular
      depends on the seed alone.
    - single-node: K distinct experts of one node, which each token draws uniformly, its own
      included.
    - imbalanced: tokens of every second rank choose among the experts of the other nodes, those of
      the other ranks among their own node's.
    - trace: read, not drawn; see `Trace`.

    Weights are drawn uniformly and sum to 1 for a token.

    Raises:
        InputError: some token, on any rank, has fewer experts to choose from than K.
    """
    if trace is not None:
        first = (iteration * topology.num_ranks + topology.rank) * config.num_tokens
        topk_idx, topk_weights = trace.tokens(first, config.num_tokens)
    else:
        _check_choices(config, topology)
        rng = np.random.default_rng([config.seed, topology.rank, iteration])
        topk_idx = _draw(config, topology, rng)
        topk_weights = rng.random(topk_idx.shape, dtype=np.float32) + np.float32(2**-10)
        topk_weights /= topk_weights.sum(axis=1, keepdims=True)
    return TokenRouting(
        topk_idx=torch.from_numpy(topk_idx), topk_weights=torch.from_numpy(topk_weights)
    )


def _check_choices(config: BenchConfig, topology: Topology) -> None:
    """Raises InputError, on every rank alike, if some token has fewer experts to draw than K."""
    node_E = np.asarray(topology.node_of_rank)[np.asarray(topology.rank_of_expert)]
    of_node = np.bincount(node_E, minlength=topology.num_nodes)
    fewest = config.num_experts
    if config.pattern == "single-node":
        fewest = of_node.min()
    elif config.pattern == "imbalanced":
        of_rank = of_node[list(topology.node_of_rank)]
        fewest = min(of_rank[::2].min(), config.num_experts - of_rank[1::2].max(initial=0))
    if fewest < config.top_k:
        raise input_error(
            "bench",
            "top_k",
            got=f"{config.top_k} with {config.num_experts} experts on {topology.num_nodes} nodes",
            expected=f'at most {fewest}, all that some token of pattern "{config.pattern}" has to '
            "choose from",
            remedy="change top_k, num_experts or ranks_per_node",
        )


def _draw(config: BenchConfig, topology: Topology, rng: np.random.Generator) -> NDArray[np.int64]:
    # An exponential race: the K earliest of arrivals at these rates are K draws without
    # replacement, each with probability in proportion to what popularity is left.
    shape = (config.num_tokens, config.num_experts)
    arrival_TE = rng.standard_exponential(shape, dtype=np.float32) / _popularity(config)
    arrival_TE[~np.broadcast_to(_allowed(config, topology, rng), shape)] = np.inf
    first_TK = np.argpartition(arrival_TE, config.top_k - 1, axis=1)[:, : config.top_k]
    order_TK = np.argsort(np.take_along_axis(arrival_TE, first_TK, axis=1), axis=1)
    return np.take_along_axis(first_TK, order_TK, axis=1).astype(np.int64)


def _popularity(config: BenchConfig) -> NDArray[np.float32]:
    if config.pattern != "zipf":
        return np.ones(config.num_experts, dtype=np.float32)
    place = np.random.default_rng(config.seed).permutation(config.num_experts) + 1
    return (place**-ZIPF_EXPONENT).astype(np.float32)


def _allowed(
    config: BenchConfig, topology: Topology, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which experts each token may choose: [T, E], or [1, E] where all tokens may the same."""
    node_E = np.asarray(topology.node_of_rank)[np.asarray(topology.rank_of_expert)]
    allowed = np.ones((1, config.num_experts), dtype=np.bool_)
    if config.pattern == "single-node":
        allowed = rng.integers(topology.num_nodes, size=(config.num_tokens, 1)) == node_E
    elif config.pattern == "imbalanced":
        is_own_E = node_E == topology.node
        allowed = (~is_own_E if topology.rank % 2 else is_own_E)[None]
    return allowed
