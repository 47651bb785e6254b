"""Kernels can be compiled ahead, also on a machine without a GPU."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fusco import env
from fusco.cli import app
from fusco.engines.cuda.fast_path import problem
from fusco.engines.cuda.jit import VARIANTS, cubin_path, known_architectures
from fusco.engines.cuda.launch import architecture

pytest.importorskip("cuda.core")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    return tmp_path / "kernels"


def test_every_kernel_is_compiled_once(folder: Path) -> None:
    first = CliRunner().invoke(app, ["warmup", "--arch", "sm_80", "--arch", "sm_90a"])
    assert first.exit_code == 0, first.output
    lines = first.output.splitlines()
    assert len(lines) == 2 * len(VARIANTS) + 2
    assert all(line.startswith(("sm_80", "sm_90a")) for line in lines[:-2])
    assert lines[-2].startswith("host")
    assert len(list(folder.iterdir())) == 2 * len(VARIANTS)
    assert str(folder) in lines[-1]
    second = CliRunner().invoke(app, ["warmup", "--arch", "sm_90a"])
    assert second.output.count("was there") == len(VARIANTS) + (not problem())


def test_what_is_compiled_is_what_a_gpu_loads(folder: Path) -> None:
    result = CliRunner().invoke(app, ["warmup", "--arch", "sm_90", "--arch", "sm_90a"])
    assert result.exit_code == 0, result.output
    loaded = {cubin_path(variant, architecture_of((9, 0))) for variant in VARIANTS}
    assert set(folder.iterdir()) == loaded


@pytest.mark.parametrize("name", known_architectures())
def test_every_known_architecture_is_one_that_a_gpu_loads(name: str) -> None:
    number = int(name.strip("sm_a"))
    assert architecture_of(divmod(number, 10)) == name


def architecture_of(capability: tuple[int, int]) -> str:
    """What a GPU of this compute capability asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return architecture(0)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.CACHE_DIR.name, "/proc/none")
    result = CliRunner().invoke(app, ["warmup", "--arch", "sm_90a"])
    assert result.exit_code == 2
    assert "kernels cannot be kept" in result.stderr
    assert env.CACHE_DIR.name in result.stderr
    assert "Kernels are in" not in result.output


def test_a_cache_of_another_user(request: pytest.FixtureRequest) -> None:
    cubin_path(VARIANTS[0], "sm_90a")  # reads the sources, which another user may not
    request.getfixturevalue("foreign_tmp_path")
    result = CliRunner().invoke(app, ["warmup", "--arch", "sm_90a"])
    assert result.exit_code == 2, result.exception
    assert "kernels cannot be kept: [Errno 13] Permission denied" in result.stderr
    assert "a folder that can be written" in result.stderr


def test_a_kernel_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def full(file: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="kernels and the fast path are compiled anew"):
        result = CliRunner().invoke(app, ["warmup", "--arch", "sm_90a"])
    assert result.exit_code == 1
    assert f"kernel reach cannot be kept in {folder}" in result.stderr


@pytest.mark.parametrize("name", ["sm_1", "sm_80a", "90"])
def test_an_unknown_architecture(name: str) -> None:
    result = CliRunner().invoke(app, ["warmup", "--arch", name])
    assert result.exit_code == 2
    assert "sm_90a" in result.output + result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs to compile for")
def test_without_a_gpu_an_architecture_must_be_named() -> None:
    result = CliRunner().invoke(app, ["warmup"])
    assert result.exit_code == 2
    assert "--arch" in result.output + result.stderr


@pytest.mark.gpu
def test_every_gpu_reaches_every_other() -> None:
    from fusco.engines.cuda.peers import try_link

    for source in range(torch.cuda.device_count()):
        for target in range(torch.cuda.device_count()):
            if source != target and torch.cuda.can_device_access_peer(source, target):
                link = try_link(source, target)
                assert not link.problem
                assert min(link.write_gbps, link.read_gbps) > 1
