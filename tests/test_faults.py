"""A rank is killed, stopped, or raises: the survivors say who, in time, and exit; no file stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusco.testing.faults import Program, expect_survival

# Of the start methods, forkserver is the fast one; spawn ends as a user's interpreter does.
FAULTS = [
    ("kill", "combine", "spawn"),
    ("kill", "dispatch", "forkserver"),
    ("stop", "combine", "forkserver"),
    ("stop", "backward", "forkserver"),
    ("raise", "combine", "forkserver"),
    ("exit", "dispatch", "forkserver"),
    ("idle", "dispatch", "forkserver"),
]


@pytest.mark.parametrize(("fault", "when", "method"), FAULTS)
def test_survivors_name_the_rank_and_exit(
    engine: str,
    fault: str,
    when: str,
    method: str,
    tmp_path: Path,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = files()
    program = Program(engine=engine, fault=fault, when=when, folder=tmp_path)
    pids = [str(pid) for pid in expect_survival(program, method)]
    left = {name for name in files() - before if "fusco" in name or any(p in name for p in pids)}
    assert not left
    assert not list(temporary.iterdir())


def files() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
