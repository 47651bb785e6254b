"""How a baseline permutes rows: by Triton where it is installed, else by torch."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class RowMover(ABC):
    """The permutations around an all_to_all. Suffixes: T tokens, K choices of a token.

    Attributes:
        name: what the record calls it.
    """

    name: str

    @abstractmethod
    def spread(self, x: Tensor, choice_of_place: Tensor, place_TK: Tensor) -> Tensor:
        """Every token of `x` once a choice, `[P, H]`, each at the choice's place.

        Args:
            x: `[T, H]`.
            choice_of_place: int64 `[P]`, the choice, as t * K + k, that goes to each place.
            place_TK: its inverse; below 0 where a choice goes nowhere.
        """

    @abstractmethod
    def gather(self, rows: Tensor, index: Tensor) -> Tensor:
        """`rows[index]`."""

    @abstractmethod
    def weighted_sum(self, rows: Tensor, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """`[T, H]`, the sum of weight times row over a token's choices, in fp32; -1 is no row."""


class TorchRows(RowMover):
    """Plain torch."""

    name = "torch"

    def spread(self, x: Tensor, choice_of_place: Tensor, place_TK: Tensor) -> Tensor:
        return torch.index_select(x, 0, choice_of_place // place_TK.shape[1])

    def gather(self, rows: Tensor, index: Tensor) -> Tensor:
        return torch.index_select(rows, 0, index)

    def weighted_sum(self, rows: Tensor, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((len(row_TK), rows.shape[1]), dtype=wide, device=rows.device)
        if len(rows) == 0:
            return total.to(rows.dtype)
        for row_T, weight_T in zip(row_TK.unbind(1), weight_TK.unbind(1), strict=True):
            there_T = weight_T * (row_T >= 0)
            total.addcmul_(rows[row_T.clamp(min=0)].to(wide), there_T.to(wide)[:, None])
        return total.to(rows.dtype)


def fastest_rows(dtype: torch.dtype) -> RowMover:
    """The fastest that can run here and sums this dtype as the contract wants it.

    Triton comes with torch for CUDA, also where there is no GPU, and does not run there.
    """
    has_triton = importlib.util.find_spec("triton") is not None and torch.cuda.is_available()
    if has_triton and dtype != torch.float64:
        from fusco.bench.triton_rows import TritonRows

        return TritonRows()
    return TorchRows()
