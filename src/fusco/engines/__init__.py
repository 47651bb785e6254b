"""Engines by name, made lazily: adding one is a folder beside these and a line here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from fusco.engines.base import Engine, World
from fusco.errors import EngineUnavailableError


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
    from fusco.engines.cpu import CpuEngine

    return CpuEngine(world)


FACTORIES: dict[str, Callable[[World], Engine]] = {
    "cpu": _make_cpu,
    "reference": _make_reference,
}
"""Fastest first: the order in which `engine="auto"` tries them."""


def probe() -> tuple[EngineProbe, ...]:
    """What can run here, in order of preference."""
    reason = _why_no_cpu_engine()
    return (
        EngineProbe(
            name="cpu",
            available=not reason,
            reason=reason or "shared-memory windows between the ranks of this host",
        ),
        EngineProbe(
            name="reference",
            available=True,
            reason="plain torch.distributed messages, any device and group",
        ),
    )


def _why_no_cpu_engine() -> str:
    if not sys.platform.startswith("linux"):
        return f"needs Linux (memfd, futex, pidfd), this is {sys.platform}"
    if not os.path.isdir("/proc/self/fd"):
        return "needs /proc, through which ranks open each other's windows"
    return ""


def make_engine(name: str, world: World) -> Engine:
    """The engine of that name.

    Raises:
        EngineUnavailableError: it cannot run here.
    """
    for engine in probe():
        if engine.name == name and not engine.available:
            raise EngineUnavailableError(f"Shuffle: engine {name!r} {engine.reason}")
    return FACTORIES[name](world)
