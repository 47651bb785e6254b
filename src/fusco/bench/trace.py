"""Routing recorded from a real model, read from a file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fusco.errors import InputError, input_error


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One layer of a recorded routing.

    Attributes:
        topk_idx: int64 `[tokens, top_k]`, in the order the tokens were generated.
        topk_weights: fp32 `[tokens, top_k]`, as recorded.
        num_experts: experts of the model.
        layer: the layer's number in the model.
    """

    topk_idx: NDArray[np.int64]
    topk_weights: NDArray[np.float32]
    num_experts: int
    layer: int

    @property
    def top_k(self) -> int:
        """Experts of each token."""
        return int(self.topk_idx.shape[1])

    def tokens(self, first: int, num_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """`num_tokens` consecutive tokens from `first` on, modulo their number."""
        at = np.arange(first, first + num_tokens) % len(self.topk_idx)
        return self.topk_idx[at], self.topk_weights[at]


def load_trace(path: Path) -> Trace:
    """Read the middle one of a trace's layers.

    The file is an `.npz` with `topk_idx` `[layers, tokens, top_k]`, `topk_weights` of that shape,
    `layers` `[layers]`, the number of each layer in its model, and the scalar `num_experts`.

    Raises:
        InputError: there is no such file, or it is no trace.
    """
    if not path.is_file():
        raise _unreadable(path, "which is not there")
    if not zipfile.is_zipfile(path):
        raise _unreadable(path, "which is no .npz file")
    try:
        with np.load(path) as file:
            middle = len(file["layers"]) // 2
            trace = Trace(
                topk_idx=file["topk_idx"][middle].astype(np.int64),
                topk_weights=file["topk_weights"][middle].astype(np.float32),
                num_experts=int(file["num_experts"]),
                layer=int(file["layers"][middle]),
            )
    except (OSError, KeyError, IndexError, ValueError, TypeError) as error:
        raise _unreadable(path, f"in which {error}") from error
    if trace.topk_idx.ndim != 2 or trace.topk_idx.shape != trace.topk_weights.shape:
        shapes = f"{trace.topk_idx.shape} and {trace.topk_weights.shape}"
        raise _unreadable(path, f"in which a layer's topk_idx and topk_weights are {shapes}")
    return trace


def check_trace(trace: Trace, *, num_experts: int, top_k: int) -> None:
    """Raises InputError unless the trace is of `num_experts` experts and `top_k` choices."""
    for argument, got, recorded in (
        ("num_experts", num_experts, trace.num_experts),
        ("top_k", top_k, trace.top_k),
    ):
        if got != recorded:
            raise input_error(
                "bench",
                argument,
                got=str(got),
                expected=f"{recorded}, which the trace was recorded with",
                remedy=f"give {recorded}, or another trace",
            )


def _unreadable(path: Path, problem: str) -> InputError:
    return input_error(
        "bench",
        "trace",
        got=f"{path}, {problem}",
        expected="an .npz file with topk_idx and topk_weights [layers, tokens, top_k], layers and "
        "num_experts",
        remedy="give another file",
    )
