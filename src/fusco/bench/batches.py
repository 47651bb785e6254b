"""What is dispatched and combined in a measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusco.bench.config import BenchConfig
from fusco.bench.patterns import RoutingSet, TokenRouting, make_routing
from fusco.bench.trace import load_trace
from fusco.topology import Topology

NUM_ROUTINGS = 8


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's tokens `[T, H]` and their routing, on its device."""

    x: Tensor
    routing: TokenRouting

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a dispatch takes."""
        return self.x, self.routing.topk_idx, self.routing.topk_weights


class Outputs:
    """Expert outputs, mostly in ordinary memory of this rank, whose pages are there before the
    clock."""

    def __init__(self, config: BenchConfig, device: torch.device) -> None:
        shape = (0, config.hidden_size)
        self._memory = torch.zeros(shape, dtype=config.torch_dtype, device=device)
        self._rows: dict[int, Tensor] = {}

    def of(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """Rows to combine, in `rows` if they are given. They differ between a token's experts, as
        those of a model do."""
        if rows is None:
            self.reserve(len(tokens))
            rows = self.rows(len(tokens))
        factors = (torch.arange(len(tokens), device=tokens.device) % 7 + 1) / 8
        return torch.mul(tokens, factors.to(tokens.dtype)[:, None], out=rows)

    def reserve(self, num_rows: int) -> None:
        """Have room for so many; what is asked for up to that is always the same memory."""
        if len(self._memory) < num_rows:
            self._memory = self._memory.new_zeros((num_rows, self._memory.shape[1]))
            self._rows.clear()

    def rows(self, num_rows: int) -> Tensor:
        """So many of the rows that are there from an earlier `of`; cached, for slicing takes time
        inside the clock."""
        rows = self._rows.get(num_rows)
        if rows is None:
            rows = self._rows[num_rows] = self._memory[:num_rows]
        return rows


def make_batches(
    config: BenchConfig, topology: Topology, routing: RoutingSet | None, device: torch.device
) -> list[Batch]:
    """What this rank dispatches, in rotation."""
    generator = torch.Generator().manual_seed(config.seed * topology.num_ranks + topology.rank)
    x = torch.randn((config.num_tokens, config.hidden_size), generator=generator)
    x = x.to(config.torch_dtype).to(device)
    if routing is not None:
        routings = [routing.of(i, topology.rank) for i in range(len(routing))]
    else:
        trace = None if config.trace is None else load_trace(config.trace)
        routings = [make_routing(config, topology, i, trace) for i in range(NUM_ROUTINGS)]
    return [Batch(x=x, routing=one.to(device)) for one in routings]
