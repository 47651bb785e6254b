"""Launches kernels: arguments are C structs, passed by value."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from fusco.engines.cuda import jit

_OVERLAP = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: the kernel may begin while the one before
it in its stream ends; see `await_kernel_before` in device.cuh."""
_OVERLAP_SINCE = (9, 0)
"""Compute capability of the first GPUs that do so."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which the value is a number."""

    _fields_ = (("id", ctypes.c_int), ("_gap", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_yz", ctypes.c_uint * 2),
        ("block_x", ctypes.c_uint),
        ("block_yz", ctypes.c_uint * 2),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Launch(NamedTuple):
    """What the driver's function takes, all addresses.

    Attributes:
        config, function, parameters: see cuLaunchKernelEx.
        stream_at: where in the configuration the stream has to be.
    """

    config: int
    function: int
    parameters: int
    stream_at: int


class Launcher:
    """A kernel loaded on one device, and the structs that it takes, whose fields may change between
    launches.

    Args:
        variant: which kernel.
        device: index of the device, the current one of this thread.
        arguments: what it is launched with.
        shared_bytes: the most dynamic shared memory that a launch will ask for.
    """

    def __init__(
        self,
        variant: jit.Variant,
        device: int,
        arguments: tuple[ctypes.Structure, ...],
        shared_bytes: int = 0,
    ) -> None:
        from cuda.bindings import driver
        from cuda.core import Device

        Device(device).set_current()
        function, self._module = _load(variant, device)
        if shared_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
        self._function = ctypes.c_void_p(int(function))
        self._launch = _launch_function()
        self._config = _Config(grid_yz=(1, 1), block_yz=(1, 1))
        # Without bulk copies all is as on GPUs before Hopper.
        if variant.bulk and torch.cuda.get_device_capability(device) >= _OVERLAP_SINCE:
            self._config.attributes = ctypes.pointer(_Attribute(id=_OVERLAP, value=(1,)))
            self._config.num_attributes = 1
        self._at = ctypes.c_void_p(ctypes.addressof(self._config))
        self._arguments = arguments
        self._addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self._parameters = ctypes.c_void_p(ctypes.addressof(self._addresses))
        self._prepared: dict[tuple[int, int, int], _Config] = {}

    def __call__(self, stream: int, grid: int, block: int, shared_bytes: int = 0) -> None:
        """Launch on a stream; the arguments may change as soon as this returns."""
        config = self._config
        config.grid_x, config.block_x = grid, block
        config.shared_bytes, config.stream = shared_bytes, stream
        error = self._launch(self._at, self._function, self._parameters, None)
        if error:
            raise RuntimeError(f"cuLaunchKernelEx: CUDA driver error {error}")

    def prepare(self, grid: int, block: int, shared_bytes: int) -> Launch:
        """For others than Python to launch."""
        key = grid, block, shared_bytes
        config = self._prepared.get(key)
        if config is None:
            config = self._prepared[key] = _Config.from_buffer_copy(self._config)
            config.grid_x, config.block_x, config.shared_bytes = key
        at = ctypes.addressof(config)
        function, parameters = self._function.value, self._parameters.value
        assert function is not None
        assert parameters is not None
        return Launch(at, function, parameters, at + _Config.stream.offset)


@functools.cache
def _load(variant: jit.Variant, device: int) -> tuple[Any, Any]:
    """A kernel's function on the current device, and the module that holds it."""
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    # NOTE: for good. A capture fails if a module is unloaded meanwhile.
    module = ObjectCode.from_cubin(jit.cubin(variant, architecture(device)))
    return checked(driver.cuKernelGetFunction(module.get_kernel(variant.name).handle)), module


@functools.cache
def _launch_function() -> Any:
    # NOTE: a launch through cuda.core or cuda.bindings takes several times as long as the driver's
    # own, and a small dispatch little longer than its launches. Its types are not declared, which
    # would double the time: so each argument must be a c_void_p or None.
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


def launch_address() -> int:
    """Where the driver's function is, for others than Python to call."""
    address = ctypes.cast(_launch_function(), ctypes.c_void_p).value
    assert address is not None
    return address


def architecture(device: int) -> str:
    """What to compile for, such as "sm_90a"."""
    major, minor = torch.cuda.get_device_capability(device)
    return jit.target(10 * major + minor)


def checked(result: tuple[Any, ...]) -> Any:
    """What a function of cuda.bindings returns: nothing, a value, or a list of several."""
    error, *values = result
    if error:
        raise RuntimeError(f"CUDA driver: {error!r}")
    return values[0] if len(values) == 1 else values or None
