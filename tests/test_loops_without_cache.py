"""Where no folder can be written, the compiled loops of the CPU engine run all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fusco

PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fusco.engines.cpu.kernels import memory, order
print(*(warning.message for warning in caught), sep="\\n")
import numpy as np
memory.collect(np.zeros(0, dtype=np.int64), 1, 0)
"""


def test_loops_are_compiled_without_a_cache(tmp_path: Path) -> None:
    """Files where folders would be made keep root out as well."""
    shutil.copytree(
        Path(fusco.__file__).parent,
        tmp_path / "fusco",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for folder in ("fusco/engines/cpu/kernels/__pycache__", "home"):
        (tmp_path / folder).touch()
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"},
            "PYTHONPATH": str(tmp_path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(tmp_path / "home"),
            "NUMBA_CACHE_DIR": str(tmp_path / "home"),
        },
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert "compiled anew by every process" in line
    assert "set NUMBA_CACHE_DIR" in line
