"""Kernels compiled at run time by NVRTC, and kept on disk.

A cubin depends on the sources, the compiler, its options and the architecture, and all of them are
in its name. Files appear by an atomic rename, for many ranks start at once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusco import env
from fusco.engines.cuda.kernels.structs import declarations

_SOURCES = Path(__file__).parent / "kernels"
ELEMENTS = ("bfloat16", "float16", "float32", "float64")
"""Dtypes that rows can be summed in; kernels know them by their index."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel as it is compiled.

    Attributes:
        name: of the kernel and, with ".cu", of its file.
        element: an entry of `ELEMENTS`; empty where rows are bytes.
        bulk: use bulk asynchronous copies where the architecture has them.
    """

    name: str
    element: str = ""
    bulk: bool = True

    def macros(self) -> list[str | tuple[str, str]]:
        """What its source is compiled with."""
        macros: list[str | tuple[str, str]] = []
        if self.element:
            macros.append(("FUSCO_ELEMENT", str(ELEMENTS.index(self.element))))
        if not self.bulk:
            macros.append("FUSCO_NO_BULK")
        return macros


VARIANTS = (
    Variant(name="plan"),
    Variant(name="dispatch"),
    *(Variant(name="combine", element=element) for element in ELEMENTS),
    *(Variant(name="dispatch", element=element) for element in ELEMENTS),
    Variant(name="agree"),
)
"""All kernels that a GPU may need, but for those without bulk copies on one that has them."""


def element_of(dtype: torch.dtype) -> str:
    """The entry of `ELEMENTS` for a dtype that can be summed."""
    element = str(dtype).removeprefix("torch.")
    assert element in ELEMENTS, "rows that cannot be summed are refused before"
    return element


def cubin(variant: Variant, arch: str) -> bytes:
    """The machine code of a kernel for an architecture such as "sm_90a", from disk if there."""
    name = f"{variant.name}-{variant.element or 'bytes'}-{_key(variant, arch)}.cubin"
    path = cache_folder() / name
    if path.exists():
        return path.read_bytes()
    code, _ = compile_variant(variant, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)
    return code


def compile_variant(variant: Variant, arch: str) -> tuple[bytes, str]:
    """The machine code of a kernel, and what the compiler says of its registers and spills."""
    import io

    from cuda.core import Program

    log = io.StringIO()
    program = Program(_source(variant), "c++", _options(variant, arch))
    try:
        code = program.compile("cubin", logs=log)
    finally:
        program.close()
    return bytes(code.code), log.getvalue()


def cache_folder() -> Path:
    """Where cubins are kept."""
    return Path(env.CACHE_DIR.get()).expanduser() / "kernels"


def _options(variant: Variant, arch: str) -> Any:
    from cuda.core import ProgramOptions

    return ProgramOptions(
        name=f"{variant.name}.cu",
        arch=arch,
        std="c++17",
        fma=False,
        include_path=str(_SOURCES),
        define_macro=variant.macros() or None,
        ptxas_options="-v",
    )


def _source(variant: Variant) -> str:
    return declarations() + (_SOURCES / f"{variant.name}.cu").read_text()


def _key(variant: Variant, arch: str) -> str:
    digest = hashlib.sha256(_all_sources())
    digest.update(f"{arch} {variant.macros()} {_compiler()}".encode())
    return digest.hexdigest()[:20]


@functools.cache
def _all_sources() -> bytes:
    files = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cu", ".cuh"))
    return b"\0".join([declarations().encode(), *(path.read_bytes() for path in files)])


@functools.cache
def _compiler() -> str:
    from importlib import metadata

    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}, cuda-core {metadata.version('cuda-core')}"
