"""The machine and the software that a record is of, and the file that it goes to."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fusco


def circumstances(device: str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """What every record says of where it was made.

    Args:
        device: "cpu", or "cuda" for GPUs and their software too.
        commit: of the sources, where git cannot tell.
    """
    return {
        "hardware": hardware(device),
        **({"software": gpu_software()} if device == "cuda" else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fusco": fusco.__version__,
        "commit": commit or source_commit(),
    }


def append_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a record; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@functools.cache
def hardware(device: str = "cpu") -> dict[str, Any]:
    """What this machine is: processor, usable cores and memory; for "cuda" its GPUs too."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "memory_gib": round(memory_bytes / 2**30, 1),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name(0)
        found["num_gpus"] = torch.cuda.device_count()
    return found


@functools.cache
def gpu_software() -> dict[str, str | None]:
    """Versions of what GPU measurements depend on besides torch; None where it is not there."""
    from fusco.engines.cuda import fast_path

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cuda_core": _version("cuda-core"),
        "triton": _version("triton"),
        "deep_ep": _version("deep_ep"),
        "fast_path": "compiled" if fast_path.load() is not None else None,
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def source_commit() -> str | None:
    """The git commit of the fusco that runs; None where it does not run from a checkout."""
    source = Path(fusco.__file__)
    git = ("git", "-C", str(source.parent))
    if not _output(*git, "ls-files", source.name):
        return None
    return _output(*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
