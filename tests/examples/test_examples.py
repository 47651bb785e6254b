"""The examples run as their first lines say, and print what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fusco
from fusco.testing.ranks import RankPool

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


def run(name: str, num_ranks: int) -> str:
    """The output of an example under torchrun; warnings are errors in it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={num_ranks}", str(ROOT / "examples" / name)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    there = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert there == {"quickstart", "moe_layer", "ddp", "plan_reuse", "exchange", "gpu_layer"}


def test_quickstart() -> None:
    output = run("quickstart.py", 4)
    rows = re.findall(r"rank (\d): (\d+) rows, (?:cpu|reference) engine", output)
    assert sorted(rank for rank, _ in rows) == ["0", "1", "2", "3"]
    assert sum(int(num_rows) for _, num_rows in rows) == 4 * 1024 * 4


def test_quickstart_is_the_readmes_example() -> None:
    _, code = (ROOT / "examples" / "quickstart.py").read_text().split("\n\n", 1)
    assert f"```python\n{code}```" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ["moe_layer.py", "ddp.py"])
def test_a_layer_learns(name: str, num_ranks: int) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run(name, num_ranks))]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


def test_plan_reuse_brings_tokens_back() -> None:
    output = run("plan_reuse.py", 2)
    fp8 = re.findall(r"fp8 in, torch.bfloat16 out, worst error ([\d.]+)", output)
    bf16 = re.findall(r"plan reused, worst error ([\d.]+)", output)
    assert len(fp8) == len(bf16) == 2
    # Half a unit in the last place of values below 5: 1/16 of them for fp8, 1/256 for bf16.
    assert all(0 < float(error) < 5 / 16 for error in fp8)
    assert all(float(error) <= 5 / 128 for error in bf16)


def test_exchange_turns_rows_into_columns() -> None:
    output = run("exchange.py", 3)
    assert len(re.findall(r"by rows is \[1000, 259\] by columns now", output)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_layer_says_what_it_needs() -> None:
    assert "needs a GPU a rank: 2, and torch finds 0." in run("gpu_layer.py", 2)


@pytest.mark.gpu
def test_gpu_layer() -> None:
    output = run("gpu_layer.py", torch.cuda.device_count())
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", output))
    assert last < first
    worst = re.findall(r"worst difference ([\d.]+)", output)
    assert len(worst) == 2 * torch.cuda.device_count()
    assert all(float(each) < 0.05 for each in worst)


def layer_with_and_without_grouped_products(rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        import gpu_layer

        torch.manual_seed(0)
        num_ranks, experts = dist.get_world_size(), gpu_layer.NUM_EXPERTS
        layer = gpu_layer.MoELayer(experts // num_ranks).bfloat16()
        x = torch.randn(16 + rank, gpu_layer.HIDDEN).bfloat16()
        with fusco.Shuffle(
            num_experts=experts,
            hidden_size=gpu_layer.HIDDEN,
            top_k=gpu_layer.TOP_K,
            max_tokens=32,
            expert_alignment=8,
        ) as shuffle:
            fused = layer(x, shuffle)
            fused.float().square().sum().backward()
            patch.delattr(torch, "_grouped_mm")
            torch.testing.assert_close(layer(x, shuffle), fused, rtol=2e-2, atol=2e-2)
        assert all(each.grad.abs().sum() > 0 for each in layer.parameters())


def test_gpu_layer_without_grouped_products(pool: RankPool) -> None:
    pool.run(layer_with_and_without_grouped_products)
