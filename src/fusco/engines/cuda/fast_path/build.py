"""Compiles `module.c` at run time, and keeps it on disk, as `jit.py` does for kernels."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

from fusco import env
from fusco.engines.cuda.jit import publish
from fusco.engines.cuda.kernels.structs import declarations

_NAME = "fusco_fast_path"
_COMPILERS = ("cc", "gcc", "clang")
_OPTIONS = ("-std=gnu11", "-O2", "-fPIC", "-shared")
_TIMEOUT_S = 120.0
_MOST_SAID = 500


def load() -> Any | None:
    """The module; None where it cannot be had, or is not wanted."""
    return _load_or_tell()[0]


def problem() -> str:
    """Why there is no module; empty where there is one."""
    return _load_or_tell()[1]


def _load_or_tell() -> tuple[Any | None, str]:
    if not env.FAST_PATH.get():
        return None, f"{env.FAST_PATH.name} is 0"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None, "this Python has no global lock"
    try:
        return _load(library_path())
    except OSError as error:
        return None, str(error)


@functools.cache
def _load(path: Path) -> tuple[Any | None, str]:
    with suppress(OSError, ImportError):
        return _import(path), ""
    # It is not there, or broken.
    try:
        content = compile_library()
        publish(path, content)
        with suppress(OSError, ImportError):
            return _import(path), ""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name  # it could not be kept
            copy.write_bytes(content)
            return _import(copy), ""
    except subprocess.CalledProcessError as error:
        return None, f"{error}: {error.stderr.decode(errors='replace').strip()[-_MOST_SAID:]}"
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        return None, str(error)


def _import(path: Path) -> Any:
    loader = ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def library_path() -> Path:
    """Where it is kept: what it depends on is in its name."""
    digest = hashlib.sha256(declarations().encode())
    for source in sorted(_folder().glob("*.[ch]")):
        digest.update(source.read_bytes())
    digest.update(f"{_OPTIONS} {sys.version} {platform.machine()}".encode())
    folder = Path(env.CACHE_DIR.get()).expanduser() / "host"
    return folder / f"{_NAME}-{digest.hexdigest()[:20]}.so"


def compile_library(*options: str) -> bytes:
    """The shared library.

    Args:
        options: more of them for the compiler.

    Raises:
        FileNotFoundError: there is no compiler.
        OSError, subprocess.SubprocessError: it fails.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C compiler is here, of {', '.join(_COMPILERS)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # C has no types of enumerations before C23.
        (folder / "structs.h").write_text(declarations().replace("enum : int", "enum"))
        headers = (str(folder), *map(sysconfig.get_path, ("include", "platinclude")))
        includes = [f"-I{each}" for each in dict.fromkeys(headers)]
        source, library = _folder() / "module.c", folder / "module.so"
        subprocess.run(
            [compiler, *_OPTIONS, *options, *includes, str(source), "-o", str(library)],
            check=True,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
        return library.read_bytes()


def _folder() -> Path:
    return Path(__file__).parent
