"""What `make gpu-test` checks, with kernels that are emulated: all that the host does."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulator import emulated

from fusco.testing.conformance import CHECKS
from fusco.testing.gpu.checks import GPU_CHECKS
from fusco.testing.gpu.runner import run_check
from fusco.testing.ranks import RankPool, subgroup

# Rows of bytes need not be units of 16 there, and the others are of no Shuffle, or of GPUs alone.
NOT_THESE = {"bytes", "exchange", "nccl-group", "gpu-mistakes"}
NAMES = [each.name for each in (*CHECKS, *GPU_CHECKS) if each.name not in NOT_THESE]
IN_STEP = ("gradients", "compiled", "strided", "overflow", "graphs-overflow")
"""Computing with what has arrived, which does not wait for it on a CPU."""


def check(rank: int, name: str, num_ranks: int, folder: Path) -> str | None:
    if subgroup(range(num_ranks)) is None:
        return None
    with emulated(folder, in_step=name.startswith(IN_STEP)):
        return run_check(rank, name, num_ranks, "reference")


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_emulated(pool: RankPool, name: str, num_ranks: int, tmp_path: Path) -> None:
    assert not [each for each in pool.run(check, name, num_ranks, tmp_path) if each]
