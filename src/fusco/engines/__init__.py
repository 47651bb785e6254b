"""Engines by name, made lazily: adding one is a folder beside these and a line here."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusco.devices import why_no_windows
from fusco.engines.base import Engine, World
from fusco.engines.cpu import futex
from fusco.errors import EngineUnavailableError
from fusco.groups import cuda_backend

_OLDEST_TORCH = (2, 11)
_OLDEST_CUDA = 13


@dataclass(frozen=True, kw_only=True)
class EngineProbe:
    """Whether an engine can run in this process.

    Attributes:
        name: the name for `engine=`.
        available: whether it can run.
        reason: what it runs on, or why it cannot.
    """

    name: str
    available: bool
    reason: str


def _make_reference(world: World) -> Engine:
    from fusco.engines.reference import ReferenceEngine

    return ReferenceEngine(world)


def _make_cpu(world: World) -> Engine:
    from fusco.engines.cpu.engine import CpuEngine

    return CpuEngine(world)


def _make_cuda(world: World) -> Engine:
    from fusco.engines.cuda import CudaEngine

    return CudaEngine(world)


def _make_two_level(world: World) -> Engine:
    from fusco.engines.two_level import TwoLevelEngine

    if cuda_backend(world.group) == "nccl" and torch.cuda.is_available():
        from fusco.engines.cuda.node import CudaNode

        return TwoLevelEngine(world, CudaNode)
    from fusco.engines.cpu.node import CpuNode
    from fusco.engines.cpu.sliced import CompiledPlanner

    return TwoLevelEngine(world, CpuNode, CompiledPlanner)


FACTORIES: dict[str, Callable[[World], Engine]] = {
    "cuda": _make_cuda,
    "cpu": _make_cpu,
    "two_level": _make_two_level,
    "reference": _make_reference,
}
"""Fastest first: the order in which `engine="auto"` tries them."""


def probe() -> tuple[EngineProbe, ...]:
    """What can run here, in order of preference."""
    reason = _why_no_cpu_engine()
    no_cuda = _why_no_cuda_engine()
    has_gpu = torch.cuda.is_available()
    return (
        EngineProbe(
            name="cuda",
            available=not no_cuda,
            reason=no_cuda or "kernels that write into the windows of other GPUs of this node",
        ),
        EngineProbe(
            name="cpu",
            available=not reason,
            reason=reason or "shared-memory windows between the ranks of this host",
        ),
        EngineProbe(
            name="two_level",
            available=not reason or has_gpu,
            reason=_two_level_reason(reason, has_gpu),
        ),
        EngineProbe(
            name="reference",
            available=True,
            reason="plain torch.distributed messages, any device and group",
        ),
    )


def _two_level_reason(no_cpu: str, has_gpu: bool) -> str:
    if no_cpu and not has_gpu:
        return no_cpu
    kinds = [*([] if no_cpu else ["CPU tensors"])]
    if has_gpu:
        kinds.append("GPU tensors where NCCL serves the group")
    return f"torch.distributed in slices between hosts: {', and '.join(kinds)}"


def _why_no_cpu_engine() -> str:
    if not sys.platform.startswith("linux"):
        return f"needs Linux (memfd, futex, pidfd), this is {sys.platform}"
    if not os.path.isdir("/proc/self/fd"):
        return "needs /proc, through which ranks open each other's windows"
    if not futex.is_known_here():
        return f"does not know the futex call of this processor, {platform.machine()}"
    return ""


def _why_no_cuda_engine() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch finds none"
    return why_no_windows() or why_no_kernels()


def why_no_kernels() -> str:
    """Why the kernels of the CUDA engine cannot run in this process; empty: they can."""
    return _why_old_torch() or missing_cuda_package()


def _why_old_torch() -> str:
    # A nightly build of a release counts as that release.
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    cuda = torch.version.cuda
    if version >= _OLDEST_TORCH and cuda and int(cuda.split(".")[0]) >= _OLDEST_CUDA:
        return ""
    oldest = ".".join(map(str, _OLDEST_TORCH))
    return (
        f"needs torch {oldest} or later for CUDA {_OLDEST_CUDA} or later, and this is "
        f"{torch.__version__} for {f'CUDA {cuda}' if cuda else 'no CUDA'}"
    )


def missing_cuda_package() -> str:
    """Which of the packages that compile kernels is not installed; empty: all are."""
    for package in ("cuda.core", "cuda.bindings.nvrtc"):
        if not _is_installed(package):
            return f"needs {package}: pip install 'fusco[cuda]'"
    return ""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def make_engine(name: str, world: World) -> Engine:
    """The engine of that name.

    Raises:
        EngineUnavailableError: it cannot run here.
    """
    for engine in probe():
        if engine.name == name and not engine.available:
            raise EngineUnavailableError(f"Shuffle: engine {name!r} {engine.reason}")
    # The caller's default may be another, such as "meta" while a model is only described.
    with torch.device("cpu"):
        return FACTORIES[name](world)
