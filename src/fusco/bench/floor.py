"""The physical floor: what merely copying the bytes takes, with all ranks copying at once."""

from __future__ import annotations

import torch

# NOTE: large against the caches that four ranks share on a server (32 MiB on an EPYC 7003).
COPY_BYTES = 32 * 2**20


class CopyMeter:
    """One rank's share of the copy that measures bandwidth: `COPY_BYTES` from buffer to buffer."""

    def __init__(self) -> None:
        self._source = torch.ones(COPY_BYTES // 4)
        self._target = torch.zeros(COPY_BYTES // 4)

    def copy(self) -> None:
        """Copy once. The pages of both buffers are there already."""
        self._target.copy_(self._source)


def copy_gbps(num_ranks: int, seconds: float) -> float:
    """10^9 bytes a second, read plus written, that `num_ranks` ranks copying at once reach."""
    return 2 * COPY_BYTES * num_ranks / seconds / 1e9


def floor_ms(num_tokens: float, num_rows: float, row_bytes: int, gbps: float) -> float:
    """The least time of a dispatch, and of a combine, at that copy bandwidth.

    A dispatch must read each token once and write each expert-major row once; a combine must read
    each row once and write each token once. Nothing else is counted: no plan, no weights, no
    counts, no line that the cache reads because it is about to be written.

    Args:
        num_tokens: tokens with their rows, of all ranks.
        num_rows: expert-major rows, of all ranks.
        row_bytes: bytes of a row.
        gbps: from `copy_gbps`, measured in the same run.
    """
    return (num_tokens + num_rows) * row_bytes / gbps / 1e6
