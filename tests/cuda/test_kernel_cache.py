"""The kernels kept on disk: never a wrong or a broken one, however many ranks start at once."""

from __future__ import annotations

import multiprocessing
import os
import resource
from importlib import metadata
from pathlib import Path

import pytest

from fusco import env
from fusco.engines.cuda import jit

pytest.importorskip("cuda.core")

VARIANT = jit.Variant(name="agree")
ARCH = "sm_90a"
NUM_PROCESSES = 4


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> tuple[bytes, str]:
        raise AssertionError("compiled again")

    monkeypatch.setattr(jit, "compile_variant", fail)


def test_the_second_time_nothing_is_compiled(folder: Path, request: pytest.FixtureRequest) -> None:
    code = jit.cubin(VARIANT, ARCH)
    assert code.startswith(b"\x7fELF")
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]
    request.getfixturevalue("no_compiler")
    assert jit.cubin(VARIANT, ARCH) == code


@pytest.mark.parametrize("length", [0, 1, 40, 2000])
def test_a_truncated_file_is_not_served(length: int) -> None:
    code, path = jit.cubin(VARIANT, ARCH), jit.cubin_path(VARIANT, ARCH)
    path.write_bytes(path.read_bytes()[:length])
    assert jit.cubin(VARIANT, ARCH) == code
    assert len(path.read_bytes()) > len(code)


def test_all_that_the_code_depends_on_is_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        jit.cubin_path(variant, arch)
        for arch in ("sm_80", "sm_90", "sm_90a")
        for variant in (*jit.VARIANTS, jit.Variant(name="dispatch", bulk=False))
    }
    assert len(names) == 3 * (len(jit.VARIANTS) + 1)
    before = jit.cubin_path(VARIANT, ARCH)
    monkeypatch.setattr(jit, "_all_sources", lambda: b"another header")
    other_source = jit.cubin_path(VARIANT, ARCH)
    monkeypatch.setattr(jit, "_compiler", lambda: "another compiler")
    other_compiler = jit.cubin_path(VARIANT, ARCH)
    monkeypatch.setattr(jit, "_OPTIONS", {**jit._OPTIONS, "fma": True})
    other_options = jit.cubin_path(VARIANT, ARCH)
    assert len({before, other_source, other_compiler, other_options}) == 4


def test_a_patch_release_of_the_compiler_is_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"cuda-core": "1.0"}

    def version(package: str) -> str:
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(jit, "_compiler", jit._compiler.__wrapped__)
    names = {jit.cubin_path(VARIANT, ARCH)}
    for patch in ("13.0.48", "13.0.88"):
        installed["nvidia-cuda-nvrtc"] = patch
        names.add(jit.cubin_path(VARIANT, ARCH))
    assert len(names) == 3


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=env.CACHE_DIR.name):
        assert jit.cubin(VARIANT, ARCH).startswith(b"\x7fELF")


def test_a_folder_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    code = jit.cubin(VARIANT, ARCH)
    request.getfixturevalue("foreign_tmp_path")
    # Nor may another user read the sources, perhaps.
    monkeypatch.setattr(jit, "compile_variant", lambda *_: (code, ""))
    with pytest.warns(UserWarning, match=f"cannot be kept: .*Permission.*{env.CACHE_DIR.name}"):
        assert jit.cubin(VARIANT, ARCH) == code


def test_an_entry_that_cannot_be_read() -> None:
    jit.cubin_path(VARIANT, ARCH).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert jit.cubin(VARIANT, ARCH).startswith(b"\x7fELF")


def test_a_full_disk_keeps_nothing(folder: Path) -> None:
    """As if it were full: no file may become larger than a page."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.warns(UserWarning, match="cannot be kept"):
            jit.publish(folder / "agree.cubin", bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []


def compile_at_once(start: multiprocessing.synchronize.Barrier, results: object) -> None:
    start.wait()
    results.put(jit.cubin(VARIANT, ARCH))  # type: ignore[attr-defined]


def test_many_processes_at_once(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(NUM_PROCESSES), context.Queue()
    processes = [
        context.Process(target=compile_at_once, args=(start, results), daemon=True)
        for _ in range(NUM_PROCESSES)
    ]
    for process in processes:
        process.start()
    codes = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(set(codes)) == 1
    assert len(os.listdir(folder)) == 1
