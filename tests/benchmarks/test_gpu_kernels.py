"""The benchmark of single kernels without a GPU: what it makes of a profile."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_kernels

    return gpu_kernels


def test_an_iteration_begins_at_the_barrier(module: ModuleType) -> None:
    first = [
        ("plan", 1.0, 2.0),
        ("sleep", 3.0, 9.0),
        ("barrier_kernel", 9.0, 10.0),
        ("plan", 12.0, 15.0),
        ("dispatch", 15.5, 20.0),
    ]
    second = [("barrier_kernel", 30.0, 31.0), ("plan", 31.5, 32.0), ("memset", 32.0, 33.0)]
    found = module.iterations([*second, *first])
    assert found == [
        [
            module.Run(kernel="plan", begin_us=2.0, duration_us=3.0),
            module.Run(kernel="dispatch", begin_us=5.5, duration_us=4.5),
        ],
        [module.Run(kernel="plan", begin_us=0.5, duration_us=0.5)],
    ]


def test_records_leave_out_iterations_that_lack_a_kernel(module: ModuleType) -> None:
    def runs(*us: float) -> list[object]:
        kernels = zip(("plan", "dispatch"), us, strict=False)
        return [
            module.Run(kernel=name, begin_us=10 * each, duration_us=each) for name, each in kernels
        ]

    load = module.Load(num_tokens=128, mode="eager")
    ranks = [[runs(1, 2), runs(3), runs(3, 6), runs(2, 4)], [runs(5, 7)]]
    found = module.records(load, ranks, {"commit": "told"})
    assert [(each["rank"], each["kernel"], each["iterations"]) for each in found] == [
        (0, "plan", 3),
        (0, "dispatch", 3),
        (1, "plan", 1),
        (1, "dispatch", 1),
    ]
    assert [each["p50_us"] for each in found] == [2.0, 4.0, 5.0, 7.0]
    assert [each["begin_us"] for each in found] == [20.0, 40.0, 50.0, 70.0]
    assert found[0]["min_us"] == 1.0
    assert all(each["commit"] == "told" and not each["backward"] for each in found)
