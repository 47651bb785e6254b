"""Dispatch and combine in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fusco.api import Shuffle
from fusco.bench.batches import Batch

_WARMUP = 2


class GraphReplay:
    """A pair captured once and replayed with any routing of the same shapes.

    Args:
        shuffle: with `max_recv_tokens`, so that no shape depends on the routing.
        batch: what is captured; its `x` is that of all batches.
        rows: expert outputs `[max_recv_tokens, H]`, wherever they come from.
    """

    def __init__(self, shuffle: Shuffle, batch: Batch, rows: Tensor) -> None:
        self._shuffle = shuffle
        self._x, self._rows = batch.x, rows
        self._topk_idx = batch.routing.topk_idx.clone()
        self._topk_weights = batch.routing.topk_weights.clone()
        # What runs once, such as loading kernels, must not be captured.
        for _ in range(_WARMUP):
            self._dispatch_and_combine()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may go on meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._y = self._dispatch_and_combine()

    def load(self, batch: Batch) -> None:
        """Set the routing that is replayed."""
        self._topk_idx.copy_(batch.routing.topk_idx)
        self._topk_weights.copy_(batch.routing.topk_weights)

    def run(self) -> Tensor:
        """Replay; the sums `[T, H]`, which the next replay overwrites."""
        self._graph.replay()
        return self._y

    def _dispatch_and_combine(self) -> Tensor:
        d = self._shuffle.dispatch(self._x, self._topk_idx, self._topk_weights)
        return self._shuffle.combine(self._rows, d)
