"""Every kernel compiles for every kind of GPU, without a GPU: no warnings, no spills, no stack."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fusco.engines.cuda import jit

pytest.importorskip("cuda.core")

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
PLAIN_COPIES = [
    replace(variant, bulk=False)
    for variant in jit.VARIANTS
    if variant.name in ("dispatch", "combine")
]
CASES = [(variant, arch) for variant in jit.VARIANTS for arch in ARCHITECTURES]
CASES += [(variant, arch) for variant in PLAIN_COPIES for arch in ARCHITECTURES[1:]]
GLOBAL_MEMORY = re.compile(r"^(@%p\d+ )?(ld|st|atom|red|cp)\.(?!param|shared)")
PROPERTIES = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)


@pytest.mark.parametrize(
    ("variant", "arch"),
    CASES,
    ids=[
        "-".join(filter(None, (v.name, v.element, "" if v.bulk else "plain", arch)))
        for v, arch in CASES
    ],
)
def test_compiles_without_spills(variant: jit.Variant, arch: str) -> None:
    code, log = jit.compile_variant(variant, arch)
    assert code.startswith(b"\x7fELF")
    properties = PROPERTIES.findall(log)
    assert properties, f"the compiler does not tell of spills: {log}"
    assert set(properties) == {("0", "0", "0")}, log
    assert "warning" not in log.lower(), log


@pytest.mark.parametrize("variant", jit.VARIANTS, ids=lambda v: f"{v.name}-{v.element}")
def test_nothing_is_touched_before_the_kernel_before_is_over(variant: jit.Variant) -> None:
    lines = [line.strip() for line in _ptx(variant).splitlines()]
    memory = [i for i, line in enumerate(lines) if GLOBAL_MEMORY.search(line)]
    waits = [i for i, line in enumerate(lines) if line.startswith("griddepcontrol.wait")]
    assert memory
    assert len(waits) == 1
    assert waits[0] < memory[0], lines[memory[0]]


def _ptx(variant: jit.Variant) -> str:
    # Not by cuda.core, which looks for a driver first.
    from cuda.bindings import nvrtc

    options = jit._options(variant, "sm_90a").as_bytes("nvrtc")
    _, program = nvrtc.nvrtcCreateProgram(jit._source(variant).encode(), b"kernel.cu", 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytearray(size)
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text.decode()


def test_every_kernel_has_a_variant() -> None:
    files = {path.stem for path in jit.source_folder().glob("*.cu")}
    assert files == {variant.name for variant in jit.VARIANTS}


def test_bulk_copies_are_used_where_they_are() -> None:
    for plain in PLAIN_COPIES:
        without, _ = jit.compile_variant(plain, "sm_90a")
        with_bulk, _ = jit.compile_variant(replace(plain, bulk=True), "sm_90a")
        assert with_bulk != without, plain
