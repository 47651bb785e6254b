"""Kernels compiled at run time by NVRTC, and kept on disk.

A cubin depends on the sources, the compiler, its options and the architecture, and all of them are
in its name. Files appear by an atomic rename, for many ranks start at once, and begin with a hash
of the rest, for disks run full.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusco import env
from fusco.engines.cuda.kernels.structs import declarations

ELEMENTS = ("bfloat16", "float16", "float32", "float64")
"""Dtypes that rows can be summed in; kernels know them by their index."""

# All but what differs from kernel to kernel. Sums are the same bits as on other engines only if a
# product and a sum are never one instruction.
_OPTIONS: dict[str, Any] = {"std": "c++17", "fma": False, "ptxas_options": "-v"}
_OLDEST = 80
_HASH_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel as it is compiled.

    Attributes:
        name: of the kernel and, with ".cu", of its file.
        element: an entry of `ELEMENTS`; empty where rows are bytes.
        bulk: use bulk asynchronous copies where the architecture has them; the default is the
            environment's.
    """

    name: str
    element: str = ""
    bulk: bool = field(default_factory=env.BULK_COPIES.get)

    def macros(self) -> list[str | tuple[str, str]]:
        """What its source is compiled with."""
        macros: list[str | tuple[str, str]] = []
        if self.element:
            macros.append(("FUSCO_ELEMENT", str(ELEMENTS.index(self.element))))
        if not self.bulk:
            macros.append("FUSCO_NO_BULK")
        return macros


VARIANTS = (
    Variant(name="reach"),
    Variant(name="agree"),
    Variant(name="plan"),
    Variant(name="dispatch"),
    *(Variant(name="combine", element=element) for element in ELEMENTS),
    *(Variant(name="dispatch", element=element) for element in ELEMENTS),
)
"""All kernels that a GPU may need, but for those without bulk copies on one that has them."""


def element_of(dtype: torch.dtype) -> str:
    """The entry of `ELEMENTS` for a dtype that can be summed."""
    element = str(dtype).removeprefix("torch.")
    assert element in ELEMENTS, "rows that cannot be summed are refused before"
    return element


def cubin(variant: Variant, arch: str) -> bytes:
    """The machine code of a kernel for an architecture such as "sm_90a", from disk if there."""
    if code := kept(variant, arch):
        return code
    code, _ = compile_variant(variant, arch)
    publish(cubin_path(variant, arch), _hash(code) + code)
    return code


def kept(variant: Variant, arch: str) -> bytes:
    """The machine code that is on disk; empty: none that is whole and may be read."""
    content = b""
    with suppress(OSError):
        content = cubin_path(variant, arch).read_bytes()
    head, code = content[:_HASH_BYTES], content[_HASH_BYTES:]
    return code if head == _hash(code) else b""


def cubin_path(variant: Variant, arch: str) -> Path:
    """Where the machine code of a kernel is kept."""
    name = f"{variant.name}-{variant.element or 'bytes'}-{_key(variant, arch)}.cubin"
    return cache_folder() / name


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


def source_folder() -> Path:
    """Where the sources of all kernels are."""
    return Path(__file__).parent / "kernels"


def target(number: int) -> str:
    """What is compiled for GPUs of a compute capability, and loaded by them: of 90, "sm_90a"."""
    # The "a" targets hold for exactly one architecture, which a kernel compiled here runs on.
    return f"sm_{number}" + ("a" if number >= 90 else "")


def known_architectures() -> list[str]:
    """What the compiler can compile for, of all that GPUs load."""
    from cuda.bindings import nvrtc

    _, numbers = nvrtc.nvrtcGetSupportedArchs()
    return [target(number) for number in numbers if number >= _OLDEST]


def publish(path: Path, content: bytes) -> None:
    """Keep a file, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own goes away with what is in it, also when the disk is full.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            file.write_bytes(content)
            file.replace(path)
    except OSError as error:
        warnings.warn(
            "kernels and the fast path are compiled anew by every process, for they cannot be "
            f"kept: {error}; set {env.CACHE_DIR.name} to a folder that can be written",
            stacklevel=2,
        )


def _hash(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


def _options(variant: Variant, arch: str) -> Any:
    from cuda.core import ProgramOptions

    return ProgramOptions(
        name=f"{variant.name}.cu",
        arch=arch,
        include_path=str(source_folder()),
        define_macro=variant.macros() or None,
        **_OPTIONS,
    )


def _source(variant: Variant) -> str:
    return declarations() + (source_folder() / f"{variant.name}.cu").read_text()


def _key(variant: Variant, arch: str) -> str:
    digest = hashlib.sha256(_all_sources())
    digest.update(f"{arch} {variant.macros()} {_OPTIONS} {_compiler()}".encode())
    return digest.hexdigest()[:20]


@functools.cache
def _all_sources() -> bytes:
    files = sorted(path for path in source_folder().iterdir() if path.suffix in (".cu", ".cuh"))
    return b"\0".join([declarations().encode(), *(path.read_bytes() for path in files)])


@functools.cache
def _compiler() -> str:
    from importlib import metadata

    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    found = [f"nvrtc {major}.{minor}"]
    # It does not say which patch release it is, but its package does, where it comes in one.
    for package in ("nvidia-cuda-nvrtc", "cuda-core"):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)
