"""What the driver is told of a launch, with the driver left out."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusco.engines.cuda import launch
from fusco.engines.cuda.jit import Variant

driver = pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("cuda.core")

SUCCESS = driver.CUresult.CUDA_SUCCESS
OVERLAP = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def _words(address: int, num_bytes: int) -> bytes:
    return ctypes.string_at(address, num_bytes)


@pytest.mark.parametrize(
    ("capability", "bulk", "overlaps"),
    [((8, 0), True, False), ((9, 0), True, True), ((9, 0), False, False), ((10, 0), True, True)],
)
def test_the_driver_reads_what_was_meant(
    capability: tuple[int, int], bulk: bool, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[bytes, bytes, int]] = []

    def launched(config: Any, function: Any, parameters: Any, extra: None) -> int:
        assert extra is None
        here = ctypes.cast(config, ctypes.POINTER(launch._Config)).contents
        attributes = b"".join(bytes(here.attributes[i]) for i in range(here.num_attributes))
        told.append((bytes(here)[: launch._Config.attributes.offset], attributes, function.value))
        return 0

    monkeypatch.setattr(launch, "_launch_function", lambda: launched)
    monkeypatch.setattr(launch, "_load", lambda *_: (12345, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(
        "cuda.core.Device", lambda _: SimpleNamespace(set_current=lambda: None), raising=True
    )
    launcher = launch.Launcher(Variant(name="plan", bulk=bulk), 0, ())
    for grid, block, shared_bytes, stream in ((2, 64, 48, 77), (3, 32, 0, 1 << 40)):
        launcher(stream, grid, block, shared_bytes)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, driver.CUstream(stream)
        attribute = driver.CUlaunchAttribute()
        attribute.id = OVERLAP
        attribute.value.programmaticStreamSerializationAllowed = 1
        head = _words(config.getPtr(), launch._Config.attributes.offset)
        one = _words(attribute.getPtr(), ctypes.sizeof(launch._Attribute))
        # GPUs before Hopper have no such attribute.
        assert told.pop() == (head, one if overlaps else b"", 12345)


def test_a_launch_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_launch_function", lambda: lambda *_: 719)
    monkeypatch.setattr(launch, "_load", lambda *_: (12345, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("cuda.core.Device", lambda _: SimpleNamespace(set_current=lambda: None))
    with pytest.raises(RuntimeError, match="719"):
        launch.Launcher(Variant(name="plan"), 0, ())(0, 1, 32)
