"""The benchmark of async_op without a GPU: with a Shuffle that does one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fusco.bench.clock import HostClock
from fusco.bench.contenders import make_shuffle
from fusco.bench.place import Place
from fusco.testing.ranks import RankPool

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KINDS = ("products", "pair", "serial", "async")


@contextmanager
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import gpu_overlap

        clocks = {"queued": HostClock()}
        place = Place(device=torch.device("cpu"), clocks=clocks, has_nccl=False)
        patch.setattr(gpu_overlap, "find_place", lambda config: place)
        patch.setattr(gpu_overlap, "make_shuffle", lambda config, **_: InOrder(config))
        yield gpu_overlap


class InOrder:
    """A Shuffle for CPU tensors that takes async_op, and is done when it returns."""

    def __init__(self, config: Any) -> None:
        self._shuffle = make_shuffle(config)
        self.topology, self.synchronize = self._shuffle.topology, self._shuffle.synchronize

    def __enter__(self) -> InOrder:
        return self

    def __exit__(self, *_: object) -> None:
        self._shuffle.close()

    def dispatch(self, *arguments: Any, async_op: bool = False) -> Any:
        return self._result(self._shuffle.dispatch(*arguments), async_op)

    def combine(self, *arguments: Any, async_op: bool = False) -> Any:
        return self._result(self._shuffle.combine(*arguments), async_op)

    def _result(self, result: Any, async_op: bool) -> Any:
        return (result, SimpleNamespace(wait=lambda: None)) if async_op else result


def small_load(module: ModuleType) -> Any:
    return module.Load(
        num_ranks=8,
        num_tokens=64,
        hidden_size=32,
        top_k=4,
        num_experts=32,
        num_sms=4,
        matrix_size=64,
        iterations=3,
        warmup=1,
    )


def measure(rank: int) -> Any:
    with benchmark() as module:
        times = module.measure(rank, small_load(module))
    return times.num_products, times.ms


def test_everything_is_measured_by_turns(pool: RankPool) -> None:
    outcomes = pool.run(measure)
    assert len({num_products for num_products, _ in outcomes}) == 1
    for num_products, ms in outcomes:
        assert min(num_products) >= 1
        assert set(ms) == {("products", 0), *((k, n) for k in KINDS[1:] for n in (None, 320))}
        assert all(len(each) == 3 and min(each) > 0 for each in ms.values())


def test_records_tell_what_was_hidden() -> None:
    with benchmark() as module:
        ms = {("products", 0): [2.0], ("pair", None): [3.0], ("serial", None): [5.0]}
        slow = module.Times(num_products=(1, 2), ms={**ms, ("async", None): [3.5]})
        fast = module.Times(num_products=(1, 2), ms={**ms, ("async", None): [1.0]})
        found = module.records(small_load(module), [slow, fast], {"commit": "told"})
    assert [each["what"] for each in found] == list(KINDS)
    assert [each["hidden"] for each in found] == [None, None, None, 0.75]
    assert all(each["commit"] == "told" and each["num_sms"] == 4 for each in found)
