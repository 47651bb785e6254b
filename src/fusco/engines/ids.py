"""Expert ids out of range, the one argument whose values are checked and not only its form."""

from __future__ import annotations

import torch
from torch import Tensor

from fusco.errors import InputError, input_error


def find_bad_id(topk_idx: Tensor, num_experts: int) -> InputError | None:
    """What is wrong with the values of `topk_idx`, if anything."""
    if not topk_idx.numel():
        return None
    low, high = (int(bound) for bound in torch.aminmax(topk_idx))
    if low >= -1 and high < num_experts:
        return None
    return bad_ids(low, high, num_experts)


def bad_ids(low: int, high: int, num_experts: int) -> InputError:
    """The error for expert ids from `low` to `high`.

    Only what is out of range is named: an engine that looks for nothing else knows no other bound.
    """
    wrong = [f"{low}"] if low < -1 else []
    wrong += [f"{high}"] if high >= num_experts else []
    return input_error(
        "dispatch",
        "topk_idx",
        got=f"expert ids such as {' and '.join(wrong)}",
        expected=f"-1 (no expert) to {num_experts - 1}",
        remedy="check the router, or num_experts",
    )
