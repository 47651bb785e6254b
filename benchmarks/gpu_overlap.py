"""What `async_op` hides: dispatch and combine beside matrix products on the same GPUs.

    PYTHONPATH=src python3 benchmarks/gpu_overlap.py --output FILE

Four things by turns: the pair alone; as many products as take about as long, alone; one after the
other; and both at once, half of the products beside the dispatch and half beside the combine, in
proportion to what each takes. All that with outputs of any size, for which the host waits in a
dispatch, and with `max_recv_tokens`. Needs torch with CUDA, cuda-core and numpy, and a GPU a rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fusco.bench import BenchConfig
from fusco.bench.batches import Batch, make_batches
from fusco.bench.clock import Clock
from fusco.bench.config import NCCL_BASELINE
from fusco.bench.contenders import make_shuffle
from fusco.bench.place import find_place
from fusco.machine import append_jsonl, circumstances, num_cores
from fusco.testing.ranks import RankPool

CALIBRATION_ROUNDS = 10
CALIBRATION_PRODUCTS = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is measured; a product is of two square matrices, bf16."""

    num_ranks: int
    num_tokens: int
    hidden_size: int
    top_k: int
    num_experts: int
    num_sms: int
    matrix_size: int
    iterations: int
    warmup: int

    def config(self, device: str = "cuda") -> BenchConfig:
        """For what the benchmark has already."""
        return BenchConfig(
            num_ranks=self.num_ranks,
            num_tokens=self.num_tokens,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            num_experts=self.num_experts,
            device=device,
            baselines=(NCCL_BASELINE,),
        )

    @property
    def room(self) -> int:
        """Rows of `max_recv_tokens`: what arrives where routing is uniform, and a quarter more."""
        return 5 * self.num_tokens * self.top_k // 4


@dataclass(frozen=True, kw_only=True)
class Times:
    """One rank's.

    Attributes:
        num_products: beside dispatch and beside combine.
        ms: by what was run and the rows that a dispatch always has (None: those that came), an
            entry an iteration; matrix products have 0 rows.
    """

    num_products: tuple[int, int]
    ms: dict[tuple[str, int | None], list[float]]


class Products:
    """A chain of matrix products, each of which needs the one before."""

    def __init__(self, size: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = {"device": device, "dtype": torch.bfloat16, "generator": generator}
        self._matrix = torch.randn((size, size), **shape) / size**0.5
        self._start = torch.randn((size, size), **shape)
        self._results = torch.empty_like(self._start), torch.empty_like(self._start)

    def run(self, number: int) -> None:
        """So many, on the current stream."""
        # From the start each time: powers of a random matrix do not stay in range.
        value = self._start
        for i in range(number):
            value = torch.mm(value, self._matrix, out=self._results[i % 2])


class Pair:
    """Dispatch and combine of one Shuffle, alone and with products."""

    def __init__(self, shuffle: Any, rows: torch.Tensor, products: Products) -> None:
        self.shuffle = shuffle
        self._rows = rows
        self._products = products

    def dispatch(self, batch: Batch) -> Any:
        return self.shuffle.dispatch(*batch.arguments)

    def combine(self, d: Any) -> None:
        self.shuffle.combine(self._rows[: len(d.tokens)], d)

    def alone(self, batch: Batch) -> None:
        self.combine(self.dispatch(batch))

    def serial(self, batch: Batch, numbers: tuple[int, int]) -> None:
        d = self.dispatch(batch)
        self._products.run(numbers[0])
        self.combine(d)
        self._products.run(numbers[1])

    def beside(self, batch: Batch, numbers: tuple[int, int]) -> None:
        d, arrived = self.shuffle.dispatch(*batch.arguments, async_op=True)
        self._products.run(numbers[0])
        arrived.wait()
        _, returned = self.shuffle.combine(self._rows[: len(d.tokens)], d, async_op=True)
        self._products.run(numbers[1])
        returned.wait()


def measure(rank: int, load: Load) -> Times:
    """All on one rank, by turns; collective."""
    config = load.config()
    place = find_place(config)
    clock = place.clocks["queued"]
    products = Products(load.matrix_size, place.device)
    rows = torch.ones((load.room, load.hidden_size), dtype=torch.bfloat16, device=place.device)
    with ExitStack() as stack:
        pairs = {
            room: Pair(
                stack.enter_context(
                    make_shuffle(config, num_sms=load.num_sms, max_recv_tokens=room)
                ),
                rows,
                products,
            )
            for room in (None, load.room)
        }
        batches = make_batches(config, pairs[None].shuffle.topology, None, place.device)
        numbers = calibrate(pairs[None], products, batches[0], clock)
        calls: dict[tuple[str, int | None], Callable[[Batch], None]] = {
            ("products", 0): lambda batch: products.run(sum(numbers))
        }
        for room, pair in pairs.items():
            calls["pair", room] = pair.alone
            calls["serial", room] = lambda batch, pair=pair: pair.serial(batch, numbers)
            calls["async", room] = lambda batch, pair=pair: pair.beside(batch, numbers)
        ms: dict[tuple[str, int | None], list[float]] = {what: [] for what in calls}
        for i in range(load.warmup + load.iterations):
            # Whoever comes second finds another clock rate than whoever comes first.
            for what in list(calls) if i % 2 else reversed(list(calls)):
                (begin, end) = clock.time(calls[what], batches[i % len(batches)])[1]
                if i >= load.warmup:
                    ms[what].append(1e3 * (end - begin))
        for pair in pairs.values():
            pair.shuffle.synchronize()  # raises if more came than there was room for
    return Times(num_products=numbers, ms=ms)


def calibrate(pair: Pair, products: Products, batch: Batch, clock: Clock) -> tuple[int, int]:
    """Products that take as long as dispatch and as combine; the same on all ranks."""
    ms: list[list[float]] = [[], [], []]
    for _ in range(CALIBRATION_ROUNDS):
        d, dispatch = clock.time(pair.dispatch, batch)
        _, combine = clock.time(pair.combine, d)
        _, several = clock.time(products.run, CALIBRATION_PRODUCTS)
        for found, (begin, end) in zip(ms, (dispatch, combine, several), strict=True):
            found.append(1e3 * (end - begin))
    slowest = torch.tensor([float(np.median(each)) for each in ms])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dispatch_ms, combine_ms, several_ms = slowest.tolist()
    one_ms = several_ms / CALIBRATION_PRODUCTS
    return max(1, round(dispatch_ms / one_ms)), max(1, round(combine_ms / one_ms))


def records(load: Load, times: list[Times], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One of each thing that was run. An iteration takes as long as on its slowest rank; `hidden`
    is what running both at once saves, of the shorter of the two: 1 would be all of it."""
    ms = {what: np.max([each.ms[what] for each in times], axis=0) for what in times[0].ms}
    p50 = {what: float(np.median(each)) for what, each in ms.items()}
    found = []
    for what, room in ms:
        hidden = None
        if what == "async":
            saved = p50["serial", room] - p50["async", room]
            hidden = round(saved / min(p50["pair", room], p50["products", 0]), 3)
        found.append(
            {
                "what": what,
                "max_recv_tokens": room or None,
                "p50_ms": round(p50[what, room], 4),
                "p10_ms": round(float(np.percentile(ms[what, room], 10)), 4),
                "p90_ms": round(float(np.percentile(ms[what, room], 90)), 4),
                "hidden": hidden,
                "num_products": times[0].num_products,
                **asdict(load),
                **facts,
            }
        )
    return found


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--num-experts", type=int, default=256)
    parser.add_argument("--num-sms", type=int, default=24)
    parser.add_argument("--matrix-size", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=180.0, help="for all of it")
    parser.add_argument("--output", type=Path, help="append the records here, as JSON lines")
    parser.add_argument("--commit", help="what the records say instead of what git says here")
    settings = vars(parser.parse_args())
    seconds, output, commit = (settings.pop(name) for name in ("seconds", "output", "commit"))
    load = Load(**settings)
    if torch.cuda.device_count() < load.num_ranks:
        parser.error(f"torch finds {torch.cuda.device_count()} GPUs, this needs {load.num_ranks}")
    with RankPool(
        load.num_ranks,
        device="cuda",
        timeout_s=seconds,
        threads_per_rank=max(1, num_cores() // load.num_ranks),
    ) as pool:
        times = pool.run(measure, load)
    found = records(load, times, circumstances("cuda", commit))
    for each in found:
        rows = f"{each['max_recv_tokens']} rows" if each["max_recv_tokens"] else ""
        hidden = "" if each["hidden"] is None else f"  hides {each['hidden']:.0%}"
        print(
            f"{each['what']:<9} {rows:<12} p50 {each['p50_ms']:7.3f} ms  p10 {each['p10_ms']:7.3f}"
            f"  p90 {each['p90_ms']:7.3f}{hidden}"
        )
    print(f"{found[0]['num_products']} products, {found[0]['hardware']}, torch {torch.__version__}")
    if output is not None:
        append_jsonl(output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
