"""Stable sorting by small integer keys, the one expensive primitive of planning."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def stable_argsort(keys: Tensor, bound: int) -> Tensor:
    """Indices that sort `keys` (int64 `[n]`, each in `[0, bound)`), equal keys in order."""
    if keys.device.type == "cpu" and bound <= np.iinfo(np.int16).max:
        # NumPy sorts 16-bit keys by radix, several times faster than torch's comparison sort.
        return torch.from_numpy(np.argsort(keys.to(torch.int16).numpy(), kind="stable"))
    return torch.argsort(keys, stable=True)


def offsets(counts: Tensor) -> Tensor:
    """Exclusive prefix sums with the total last: `[n]` to `[n + 1]`."""
    result = counts.new_zeros(counts.shape[0] + 1)
    torch.cumsum(counts, dim=0, out=result[1:])
    return result
