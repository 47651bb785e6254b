"""Network namespaces through `ip` and `tc`: named after the process that made them, so that what a
crash has left behind is found and removed."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusco.errors import FuscoError, input_error

_NAMED = Path("/run/netns")
_NAME = re.compile(r"fusco-(\d+)-(\d+)-")
_CLONE_NEWNET = 0x40000000
_COMMAND_S = 60


def require_namespaces(argument: str, got: object) -> None:
    """Raise an InputError unless this process may make network namespaces and shape links."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if not sys.platform.startswith("linux"):
        problem = f"on {sys.platform}"
    elif os.geteuid() != 0:
        problem = "without root rights"
    elif missing:
        problem = f"without {' and '.join(missing)}"
    else:
        return
    raise input_error(
        "cluster",
        argument,
        got=f"{got} {problem}",
        expected="Linux, root, and the programs ip and tc",
        remedy="run as root (Debian, Ubuntu: apt-get install iproute2), or leave the hosts out",
    )


def namespace_prefix() -> str:
    """What the names of this process's namespaces begin with."""
    return f"fusco-{os.getpid()}-{_start_time(os.getpid())}-"


def remove_namespaces(prefix: str) -> None:
    """Remove the namespaces of that prefix. Links in them go with them."""
    _run(
        "ip",
        "-batch",
        "-",
        lines=[f"netns del {name}" for name in _names() if name.startswith(prefix)],
    )


def remove_stale_namespaces() -> None:
    """Remove the namespaces of processes that have ended without doing so."""
    for name in _names():
        owner = _NAME.match(name)
        if owner and _start_time(int(owner[1])) != int(owner[2]):
            remove_namespaces(name)


def add_namespaces(names: Sequence[str]) -> None:
    """Make empty namespaces, with a loopback that is up."""
    _run("ip", "-batch", "-", lines=[f"netns add {name}" for name in names])
    for name in names:
        ip(name, ["link set lo up"])


def ip(namespace: str, lines: Sequence[str]) -> None:
    """Run lines of `ip` inside a namespace."""
    _run("ip", "-n", namespace, "-batch", "-", lines=lines)


def tc(namespace: str, lines: Sequence[str]) -> None:
    """Run lines of `tc` inside a namespace."""
    _run("tc", "-n", namespace, "-batch", "-", lines=lines)


def queue_bytes(namespace: str, interface: str) -> int:
    """Bytes that have left an interface, every packet's headers counted.

    They come from its shaping queue: the counters of the interface itself see the large packets
    that the kernel cuts into real ones later, and miss the headers of all but the first.
    """
    shown = _run("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", interface)
    queues: list[dict[str, Any]] = json.loads(shown)
    return sum(int(queue["bytes"]) for queue in queues if queue["kind"] == "tbf")


def enter_namespace(name: str) -> None:
    """Move the calling thread, and those that it starts from now on, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_NAMED / name).open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {name}")


def _names() -> list[str]:
    return sorted(os.listdir(_NAMED)) if _NAMED.is_dir() else []


def _start_time(process: int) -> int | None:
    """When a process started, in the kernel's ticks; None if it has ended. With its number it
    names a process for good, for numbers come again."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name of the program, in parentheses, may hold spaces.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state == "Z" else int(rest[18])


def _run(*command: str, lines: Sequence[str] = ()) -> str:
    done = subprocess.run(
        command,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=_COMMAND_S,
        check=False,
    )
    if done.returncode:
        raise FuscoError(f"cluster: {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
