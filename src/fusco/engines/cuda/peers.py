"""Whether kernels of one GPU can write and read another's memory, tried out in one process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fusco.engines.cuda.jit import Variant
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.launch import Launcher

_NUM_BYTES = 64 << 20
_NUM_RUNS = 4
_BLOCKS_PER_SM = 4
_THREADS = 512
_SALT = 0x5EED


@dataclass(frozen=True, kw_only=True)
class Link:
    """From one GPU of this machine to another.

    Attributes:
        source: index of the GPU whose kernel writes and reads.
        target: index of the GPU that owns the memory.
        problem: what does not work; empty: all does.
        write_gbps: 1e9 bytes a second, the best of a few runs; 0 where it does not work.
        read_gbps: likewise.
    """

    source: int
    target: int
    problem: str = ""
    write_gbps: float = 0.0
    read_gbps: float = 0.0


def try_link(source: int, target: int) -> Link:
    """Write into another GPU's memory, look there, and read it back."""
    link = functools.partial(Link, source=source, target=target)
    if not torch.cuda.can_device_access_peer(source, target):
        return link(problem="no peer access")
    there = torch.zeros((_NUM_BYTES // 16, 4), dtype=torch.int32, device=f"cuda:{target}")
    torch.cuda.synchronize(target)
    with torch.cuda.device(source):
        here = torch.zeros((_NUM_BYTES // 16, 4), dtype=torch.int32, device=f"cuda:{source}")
        if problem := _enable_peer_access(source, target):
            return link(problem=problem)
        arguments = structs.ReachArgs(
            there=there.data_ptr(), here=here.data_ptr(), num_vectors=len(there), salt=_SALT
        )
        kernel = Launcher(Variant(name="reach"), source, (arguments,))
        write_gbps = _gbps(kernel, source)
        arguments.is_read = True
        read_gbps = _gbps(kernel, source)
    if not _is_pattern(there):
        return link(problem="what a kernel wrote did not arrive")
    if not _is_pattern(here):
        return link(problem="a kernel did not read what is there")
    return link(write_gbps=write_gbps, read_gbps=read_gbps)


def _enable_peer_access(source: int, target: int) -> str:
    """Why it cannot be; the current device stays the source."""
    from cuda.bindings import driver
    from cuda.core import Device

    Device(target).set_current()
    _, context = driver.cuCtxGetCurrent()
    Device(source).set_current()
    (error,) = driver.cuCtxEnablePeerAccess(context, 0)
    known = (
        driver.CUresult.CUDA_SUCCESS,
        driver.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED,
    )
    return "" if error in known else f"peer access cannot be enabled: {error!r}"


def _gbps(kernel: Launcher, device: int) -> float:
    stream = torch.cuda.current_stream(device)
    num_blocks = _BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    best_ms = float("inf")
    for _ in range(_NUM_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        kernel(stream.cuda_stream, num_blocks, _THREADS)
        end.record()
        end.synchronize()
        best_ms = min(best_ms, begin.elapsed_time(end))
    return _NUM_BYTES / best_ms / 1e6


def _is_pattern(vectors: Tensor) -> bool:
    number = torch.arange(len(vectors), dtype=torch.int32, device=vectors.device)
    columns = (number, number ^ _SALT, ~number, torch.full_like(number, _SALT))
    return torch.equal(vectors, torch.stack(columns, dim=1))
