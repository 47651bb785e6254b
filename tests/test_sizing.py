"""What a Shuffle will take can be known before it is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fusco

LAYER: dict[str, Any] = {
    "num_ranks": 8,
    "num_experts": 256,
    "hidden_size": 7168,
    "top_k": 8,
    "max_tokens": 8192,
}
ROW_BYTES = 7168 * 2
MIB = 1 << 20


def hint(**changes: Any) -> fusco.BufferSizes:
    return fusco.buffer_size_hint(**(LAYER | changes))


def test_rows_of_a_balanced_layer() -> None:
    sizes = hint()
    rows = 8192 * 8 * (ROW_BYTES + 4)
    assert rows <= sizes.heap_bytes <= 1.3 * rows
    # Partials come from seven ranks, one a token and rank at the most.
    assert sizes.window_bytes >= 8192 * 7 * ROW_BYTES
    assert sizes.total_bytes == sizes.window_bytes + sizes.heap_bytes


def test_integers_of_numpy() -> None:
    assert hint(**{name: np.int32(value) for name, value in LAYER.items()}) == hint()


def test_every_dispatch_that_is_alive_has_its_own() -> None:
    assert hint(num_alive=5).heap_bytes == 5 * hint().heap_bytes
    assert hint(num_alive=5).window_bytes == hint().window_bytes


def test_the_busiest_rank_decides() -> None:
    assert hint(imbalance=2.0).heap_bytes == pytest.approx(2 * hint().heap_bytes, rel=0.01)


def test_padding_and_dtypes_count() -> None:
    padded = hint(expert_alignment=128, max_tokens=16).heap_bytes
    assert padded >= 31 * 127 * ROW_BYTES > hint(max_tokens=16).heap_bytes
    assert hint(dtype=torch.float32).heap_bytes == pytest.approx(2 * hint().heap_bytes, rel=0.01)


def test_a_fixed_size_needs_no_guess() -> None:
    assert hint(max_recv_tokens=1000).heap_bytes < 1.3 * 1000 * ROW_BYTES + 4 * MIB


def test_one_rank_alone_returns_nothing() -> None:
    assert hint(num_ranks=1).window_bytes < 16 * MIB


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_ranks": 0}, "num_ranks"),
        ({"num_alive": 0}, "num_alive"),
        ({"imbalance": 0.5}, "imbalance"),
        ({"imbalance": 9.0}, "imbalance"),
        ({"imbalance": float("nan")}, "imbalance"),
        ({"imbalance": "2"}, "imbalance"),
        ({"num_ranks": 33}, "num_ranks: got 33, expected at most 32"),
        ({"num_experts": 255}, "num_experts"),
        ({"hidden_size": -1}, "buffer_size_hint: hidden_size"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"top_k": 33}, "top_k: got 33, expected at most 32"),
        ({"num_ranks": 40, "num_experts": 320}, "num_ranks: got 40, expected at most 32"),
        ({"num_experts": 65536}, "num_experts: got 65536, expected at most 65535"),
        ({"hidden_size": 7}, "hidden_size: got 7, expected with torch.bfloat16 a multiple of 8"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(fusco.InputError, match=named):
        hint(**changes)
