"""Dispatch and combine with outputs of a fixed size, called or in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fusco.api import Shuffle
from fusco.bench.batches import Batch

_WARMUP = 2
STATIC_MODES = {False: ("static", "static eager"), True: ("graph",)}
"""By whether a pair is captured, in which modes it is measured."""


class StaticPair:
    """A pair of calls, or one captured and replayed, with any routing of the same shapes.

    Args:
        shuffle: with `max_recv_tokens`, so that no shape depends on the routing.
        batch: what comes first; its `x` is that of all batches.
        rows: expert outputs `[max_recv_tokens, H]`, wherever they come from.
        is_captured: whether `run` replays a graph.
    """

    def __init__(self, shuffle: Shuffle, batch: Batch, rows: Tensor, *, is_captured: bool) -> None:
        self._shuffle = shuffle
        self._x, self._rows = batch.x, rows
        self._topk_idx = batch.routing.topk_idx.clone()
        self._topk_weights = batch.routing.topk_weights.clone()
        # What runs once, such as loading kernels, must not be captured.
        for _ in range(_WARMUP):
            self._dispatch_and_combine()
        torch.cuda.synchronize()
        self._graph: torch.cuda.CUDAGraph | None = None
        if is_captured:
            self._capture()

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may go on meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._y = self._dispatch_and_combine()

    def load(self, batch: Batch) -> None:
        """Set the routing."""
        self._topk_idx.copy_(batch.routing.topk_idx)
        self._topk_weights.copy_(batch.routing.topk_weights)

    def run(self) -> Tensor:
        """The sums `[T, H]`, which the next replay overwrites."""
        if self._graph is None:
            return self._dispatch_and_combine()
        self._graph.replay()
        return self._y

    def _dispatch_and_combine(self) -> Tensor:
        d = self._shuffle.dispatch(self._x, self._topk_idx, self._topk_weights)
        return self._shuffle.combine(self._rows, d)
