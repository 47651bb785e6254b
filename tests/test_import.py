"""Importing fusco does no work, and what it promises to export is there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import fusco

PROBE = """
import json, os, sys, threading
import torch
before = set(os.listdir("/proc/self/fd")), threading.active_count(), dict(os.environ)
import fusco
after = set(os.listdir("/proc/self/fd")), threading.active_count(), dict(os.environ)
print(json.dumps({
    "same": before == after,
    "process group": torch.distributed.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
    "heavy": [m for m in ("numba", "matplotlib", "typer", "rich") if m in sys.modules],
}))
"""


def test_import_does_no_work() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout) == {
        "same": True,
        "process group": False,
        "cuda": False,
        "heavy": [],
    }
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["import fusco", "from fusco.cli import app; app(['--help'])"])
def test_torch_comes_with_the_first_name_that_needs_it(command: str) -> None:
    program = f"""
import atexit, sys
atexit.register(lambda: sys.stderr.write(str("torch" in sys.modules)))
{command}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr == "False"


def test_exports() -> None:
    for name in (
        "Shuffle",
        "exchange",
        "buffer_size_hint",
        "Dispatched",
        "Plan",
        "Ablation",
        "Stats",
        "FuscoError",
        "InputError",
        "DisagreementError",
        "PeerError",
        "ClosedError",
        "EngineUnavailableError",
        "__version__",
    ):
        assert hasattr(fusco, name), name
        assert name in fusco.__all__
