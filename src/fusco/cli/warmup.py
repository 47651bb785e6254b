"""`fusco warmup`: compiles the kernels of the CUDA engine before anybody waits for them."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from fusco import env
from fusco.cli.failures import FAILURE, USER_ERROR, fail, short_failures


def warmup(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Compile for it, such as sm_90a; may be repeated.",
            show_default="the GPUs of this machine",
        ),
    ] = None,
) -> None:
    """Compile all GPU kernels, and the host's fast path, into the cache, a line each. Needs no GPU
    where --arch is given.

    The exit code is not 0 where they cannot be kept.
    """
    with short_failures():
        architectures = _architectures(arch or [])
        from fusco.engines.cuda.jit import VARIANTS, cache_folder, cubin, kept

        folder = cache_folder()
        wanted = [(variant, name) for name in architectures for variant in VARIANTS]
        there = {each for each in wanted if kept(*each)}
        if len(there) < len(wanted):
            _check_writable(folder)
        for variant, name in wanted:
            was_there = (variant, name) in there
            begin = time.perf_counter()
            size = len(cubin(variant, name))
            took = "was there" if was_there else f"{time.perf_counter() - begin:.2f} s"
            label = f"{variant.name} {variant.element}".strip()
            if not was_there and not kept(variant, name):
                raise fail(f"warmup: kernel {label} cannot be kept in {folder}", FAILURE)
            typer.echo(f"{name:<8}  {label:<20}  {size >> 10:>5} KiB  {took}")
        typer.echo(_warm_fast_path())
        typer.echo(f"Kernels are in {folder}")


def _warm_fast_path() -> str:
    from fusco.engines.cuda.fast_path import problem
    from fusco.engines.cuda.fast_path.build import library_path

    path, begin = library_path(), time.perf_counter()
    was_there = path.exists()
    if missing := problem():
        return f"{'host':<8}  not compiled, which is slower for small calls: {missing}"
    if not path.exists():
        raise fail(f"warmup: the fast path cannot be kept in {path.parent}", FAILURE)
    took = "was there" if was_there else f"{time.perf_counter() - begin:.2f} s"
    return f"{'host':<8}  {'fast path':<20}  {path.stat().st_size >> 10:>5} KiB  {took}"


def _check_writable(folder: Path) -> None:
    """Find out before a kernel is compiled for nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        message = (
            f"warmup: kernels cannot be kept: {error}; set {env.CACHE_DIR.name} to a folder that "
            "can be written"
        )
        raise fail(message, USER_ERROR) from None


def _architectures(asked: list[str]) -> list[str]:
    """Those asked for, or those of the GPUs here.

    Raises:
        InputError: the compiler does not know one, or there is no GPU and none was asked for.
        EngineUnavailableError: the compiler is not installed.
    """
    import torch

    from fusco.engines import missing_cuda_package
    from fusco.errors import EngineUnavailableError, input_error

    if missing := missing_cuda_package():
        raise EngineUnavailableError(f"warmup: {missing}")
    from fusco.engines.cuda.jit import known_architectures
    from fusco.engines.cuda.launch import architecture

    here = dict.fromkeys(architecture(index) for index in range(torch.cuda.device_count()))
    if not asked and not here:
        raise input_error(
            "warmup",
            "arch",
            got="none, and no GPU",
            expected="the name of an architecture",
            remedy="pass for example --arch sm_90a, for an H100 or H200",
        )
    # Also by the name that a GPU is known by, which lacks the "a" that it is compiled with.
    known = {name.removesuffix("a"): name for name in known_architectures()}
    for name in asked:
        if name not in {*known, *known.values()}:
            raise input_error(
                "warmup",
                "arch",
                got=repr(name),
                expected=f"one of {', '.join(known.values())}",
                remedy="use the architecture of the GPU, sm_90a for an H100 or H200",
            )
    return list(dict.fromkeys(known.get(name, name) for name in asked) if asked else here)
