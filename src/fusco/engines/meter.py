"""What an engine counts of its own work, for `Shuffle.stats`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusco.types import Stats


class Meter:
    """Running totals of one engine."""

    def __init__(self, num_ranks: int) -> None:
        self.wait_s = [0.0] * num_ranks
        self._bytes_to_peer = [0] * num_ranks
        self._num_dispatches = 0
        self._num_combines = 0
        self._num_rows = 0
        self._rows_per_rank: Tensor | None = None

    def planned(self, rows_per_rank: Tensor) -> None:
        """A plan was made that gives each rank so many rows, int64 `[P]`."""
        self._rows_per_rank = rows_per_rank

    def dispatched(self, num_rows: int) -> None:
        """A dispatch has brought so many rows, padding not counted."""
        self._num_dispatches += 1
        self._num_rows += num_rows

    def combined(self) -> None:
        """A combine has returned."""
        self._num_combines += 1

    def moved(self, bytes_to_peer: Sequence[int]) -> None:
        """So many row bytes were sent to each rank."""
        for peer, num_bytes in enumerate(bytes_to_peer):
            self._bytes_to_peer[peer] += num_bytes

    def stats(self, window_bytes: int) -> Stats:
        """The totals so far."""
        imbalance = 1.0
        if self._rows_per_rank is not None and self._rows_per_rank.any():
            rows = self._rows_per_rank.double()
            imbalance = float(rows.max() / rows.mean())
        return Stats(
            num_dispatches=self._num_dispatches,
            num_combines=self._num_combines,
            num_rows=self._num_rows,
            bytes_to_peer=tuple(self._bytes_to_peer),
            load_imbalance=imbalance,
            wait_s=tuple(self.wait_s),
            window_bytes=window_bytes,
        )
